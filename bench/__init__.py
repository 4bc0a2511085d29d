"""Benchmarks: every op and both whole updates, on every backend that can run here, against the tested reference.

``python -m bench`` prints a table (``--help`` lists the options); ``pytest bench --benchmark-only`` runs the same cases
under pytest-benchmark. A case is one function in ``bench/cases/``; a new backend needs nothing here, its rows come from
the table in ``apv_fast.backend``.

``python -m bench.device`` proves and measures everything on a GPU; ``python -m bench.roofline`` prints what it must
cost; ``python -m bench.peers`` times another project's update.

Limits: figures are of this machine while it did this; compare within one run, where the contestants take turns.
"""
