"""What is expected of every target on an H200 before it is measured; ``python -m bench.roofline --targets`` prints it.

A prediction is the floor's parts at the rates that code like ours reaches, :data:`SHARES`, on the path that "auto"
takes: in bfloat16 the scans of CUDA C++, so a stack is two scans. Rivals are counted in kernels. Nothing here is a
result: held against a measurement, it will say what the model is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bench.cost import updates
from bench.cost.machine import Machine
from bench.cost.ops import PARTS, imagination_step, knn_in_fp32, stack_of
from bench.cost.scan import Scan, observe, two_scans
from bench.cost.work import Work, total

FULL = {"deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
PRETRAIN = {"B": 16, "T": 25, "deter": 1024, "hidden": 1024, "cnn_depth": 48}
FINETUNE = {"B": 50, "T": 50, "deter": 1024, "hidden": 1024, "cnn_depth": 48, "horizon": 15}
KNN = {"Q": 2300, "N": 4096, "d": 128, "k": 16}
DTYPE = "bfloat16"


class Share(NamedTuple):
    """Of the machine's rates, for one kind of work, and why."""

    rate: float  # of operations
    memory: float  # of bytes, from HBM and L2
    why: str


SHARES = {
    "phase": Share(0.7, 0.7, "every SM reads the same lines of L2 at once"),
    "product": Share(0.7, 0.85, "400 columns and 2500 rows fill tiles and waves less well than 8192 cubed"),
    "convolution": Share(0.4, 0.85, "3, 48 and 96 channels leave tensor cores' tiles half empty; stride 2"),
    "pass": Share(1.0, 0.85, "no wave is full at a kernel's beginning and end"),
}
LATENCY = 0.4e-6  # of a phase: the first operand's way from L2, behind which nothing hides
# Rivals: a small kernel in a chain of them, in a graph: it starts, reads weights and activations from L2, and ends.
KERNEL = 3.5e-6
STEP = {"forward": 9, "backward": 22}  # kernels of a compiled, hoisted step: 4 products, LayerNorm, the sample, copies
WHOLE_STEP = {"forward": 13, "backward": 28}  # of one that is not hoisted: the prior's head is in it
KNN_COUNTED = 48e-6  # docs/notes/2026-11-triton-ops.md: what its kernels' instructions and gaps add up to, 40 to 55
HOST = 8e-6  # seconds of the host for a kernel of eager PyTorch, autograd's part included
EAGER = 17500  # kernels of the reference's fine-tuning update at T = 50 and horizon 15, counted by a dispatch mode


def kind(part: Work) -> str:
    """Which of :data:`SHARES` a part has."""
    if part.barriers:
        return "phase"
    if part.convolution:
        return "convolution"
    return "product" if part.flops else "pass"


def expected(parts: Sequence[Work], machine: Machine) -> float:
    """Seconds of the parts at the rates that are expected."""
    seconds = 0.0
    for part in parts:
        share = SHARES[kind(part)]
        slower = replace(
            machine,
            rates={unit: share.rate * rate for unit, rate in machine.rates.items()},
            hbm=share.memory * machine.hbm,
            l2=share.memory * machine.l2,
            barrier=machine.barrier + LATENCY,
        )
        seconds += total([part], slower).seconds
    return seconds


@dataclass(frozen=True)
class Prediction:
    """A target's row."""

    what: str
    limit: str
    floor: float | None  # seconds
    predicted: str
    met: bool
    why: str


def _at_most(what: str, limit_ms: float, parts: Sequence[Work], machine: Machine, why: str) -> Prediction:
    seconds = expected(parts, machine)
    limit, predicted = f"<= {limit_ms:g} ms", f"{1e3 * seconds:.3g} ms"
    return Prediction(what, limit, total(parts, machine).seconds, predicted, 1e3 * seconds <= limit_ms, why)


def _times(what: str, limit: float, ours: float, rival: float, why: str) -> Prediction:
    predicted = f"{rival / ours:.1f} x ({1e3 * rival:.3g} ms)"
    return Prediction(what, f">= {limit:g} x", None, predicted, rival >= limit * ours, why)


def _compiled_scan(length: int, outside: Sequence[Work], machine: Machine, *, backward: bool) -> float:
    """Seconds of a compiled step, ``length`` times in one graph, and of the products outside of it."""
    kernels = STEP["forward"] + backward * STEP["backward"]
    return length * kernels * KERNEL + expected(outside, machine)


def _scans(machine: Machine) -> list[Prediction]:
    rows = []
    limits = {16: (0.6, 1.8), 50: (1.0, 3.0)}
    for batch, of_batch in limits.items():
        scan = Scan.of({"B": batch, "T": 50, "E": 1536, "A": 0, **FULL}, DTYPE)
        for backward, limit in zip((False, True), of_batch, strict=True):
            parts = observe(scan, machine, backward=backward)
            name = f"observe B={batch} T=50, {'both' if backward else 'forward'}"
            why = f"{10 if backward else 5} phases a step: barrier, stores, L2"
            rows.append(_at_most(name, limit, parts, machine, why))
            if backward:
                outside = [part for part in parts if not part.barriers]
                rival = _compiled_scan(50, outside, machine, backward=True)
                why = f"{sum(STEP.values())} kernels a step of {1e6 * KERNEL:.1f} us"
                rows.append(_times("  over the best rival", 1.5, expected(parts, machine), rival, why))
    return rows


def finetune_parts(machine: Machine) -> list[Work]:
    """The Meta-world update as "auto" runs it."""
    scans = two_scans(*stack_of(updates.scan_shape(FINETUNE), DTYPE), machine, backward=True)
    start = Scan.of({**updates.scan_shape(FINETUNE), "B": 2500, "T": 1}, DTYPE)
    return updates.finetune(FINETUNE, DTYPE, machine, scans, imagination_step(start, machine))


def _updates(machine: Machine) -> list[Prediction]:
    pretrain = PARTS["pretrain_update"](PRETRAIN, DTYPE, True, machine)
    finetune = finetune_parts(machine)
    ours = expected(finetune, machine)
    scans = [part for part in finetune if part.barriers]
    # The rival's update: ours, but for two scans of T steps that are launches.
    rival = ours - expected(scans, machine) + 2 * FINETUNE["T"] * sum(WHOLE_STEP.values()) * KERNEL
    eager = HOST * EAGER
    share = MEMORY.ours / MEMORY.eager
    memory = f"{share:.0%} ({MEMORY.ours:.1f} GB)"
    return [
        _at_most("pre-training update B=16 T=25", 4.0, pretrain, machine, f"{_launches(pretrain)} launches"),
        _at_most("Meta-world update B=50 T=50", 20.0, finetune, machine, f"{_launches(finetune)} launches, two scans"),
        _times("  over eager", 8, ours, eager, f"{EAGER} kernels, {1e6 * HOST:.0f} us of the host each"),
        _times("  over the best rival", 2, ours, rival, "all compiled, in a graph; scans are launches"),
        _times("  over ContextWM's", 8, ours, eager, "at least eager's: same loops, larger networks"),
        Prediction(
            "  peak memory of eager's",
            "<= 60 %",
            None,
            memory,
            share <= 0.6,
            "weights, features, heads, imagination",
        ),
    ]


def _launches(parts: Sequence[Work]) -> int:
    return sum(part.launches * part.times for part in parts)


class Memory(NamedTuple):
    """Gigabytes that a Meta-world update holds at its peak, ours and eager PyTorch's."""

    ours: float
    eager: float


def _memory() -> Memory:
    """What is held at once: weights, and what behaviour learning keeps for the way back; the world model's is less.

    A row and imagined step is 25.8 KB in ours and 81.9 KB in PyTorch's autograd (docs/notes/2026-11-triton-ops.md).
    """
    dreams, width, layers = 2500 * 16, 2048, 4 * 4  # four heads of four hidden layers
    weights = 46e6 * (4 * 4 + 2 * 2)  # with moments and gradients; in bfloat16 and its gradient
    features = dreams * width * (4 + 4 * 2)  # float32, and rounded for each head
    heads = layers * dreams * 400 * 2 * 2  # before and after ELU
    both, imagined = weights + features + heads, 2500 * 15
    return Memory((both + 25.8e3 * imagined) / 1e9, (both + 81.9e3 * imagined) / 1e9)


MEMORY = _memory()


def predictions(machine: Machine) -> list[Prediction]:
    """Every target of the issue."""
    knn = total(PARTS["knn_bonus"](KNN, "float32", False, machine), machine).seconds
    exact = 1e6 * total(knn_in_fp32(KNN), machine).seconds
    why = f"filter, check, scan; {exact:.0f} us as fp32 product"
    predicted, met = f"{1e3 * KNN_COUNTED:.3g} ms", KNN_COUNTED <= 80e-6
    row = Prediction("kNN 2300 x 4096 x 128", "<= 0.08 ms", knn, predicted, met, why)
    return [*_scans(machine), row, *_updates(machine)]
