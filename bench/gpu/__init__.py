"""The parts of ``python -m bench.device``: the library, the stages, the contests, targets, the report.

Whatever touches the GPU runs in another process (:mod:`bench.gpu.jobs`), so that a kernel that hangs or faults costs
its own figures and nothing else.
"""
