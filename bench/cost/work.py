"""Work between two synchronisations, and the least time that a machine needs for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cost.machine import Machine

UNITS = {"bfloat16": "bf16", "tf32": "tf32", "float32": "fp32"}  # dtype of a product -> what multiplies
BYTES = {"bfloat16": 2, "tf32": 4, "float32": 4}


@dataclass(frozen=True)
class Work:
    """One part: its kinds of work overlap, so the slowest binds; then come its barriers and launches.

    A barrier waits for the stores before it; every phase of a scan has some.
    """

    name: str
    flops: float = 0.0
    unit: str = "bf16"
    hbm: float = 0.0  # bytes read and written
    l2: float = 0.0  # bytes from L2 to SMs, all SMs together
    shared: float = 0.0  # bytes from shared memory or registers, all SMs together
    barriers: int = 0
    launches: int = 0
    times: int = 1  # one after the other
    convolution: bool = False  # whether the operations are a convolution's and not a product's

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds of all ``times`` by what they are spent on: the kind of work that binds, "barrier", "launch"."""
        near = machine.cached and self.hbm <= machine.l2_size
        kinds = {
            self.unit: self.flops / machine.rates[self.unit],
            "HBM": self.hbm / (machine.l2 if near else machine.hbm),
            "L2": self.l2 / machine.l2,
            "shared": self.shared / (machine.shared_width * machine.clock * machine.sms),
        }
        bound = max(kinds, key=lambda kind: kinds[kind])
        spent = {bound: kinds[bound], "barrier": self.barriers * (machine.barrier + machine.store)}
        spent["launch"] = self.launches * machine.launch
        return {kind: self.times * seconds for kind, seconds in spent.items() if seconds}


@dataclass(frozen=True)
class Floor:
    """What some parts need on a machine."""

    seconds: float
    spent: dict[str, float]  # kind -> seconds

    @property
    def bound(self) -> str:
        """What most of the time goes to, with its share: "L2 54%"."""
        if not self.spent:
            return "nothing"
        kind = max(self.spent, key=lambda name: self.spent[name])
        return f"{kind} {self.spent[kind] / self.seconds:.0%}"


def total(parts: Sequence[Work], machine: Machine) -> Floor:
    """The parts one after the other."""
    spent: Counter[str] = Counter()
    for part in parts:
        spent.update(part.seconds(machine))
    return Floor(sum(spent.values()), dict(spent))


def product(name: str, rows: float, width: float, out: float, dtype: str, *, launches: int = 1) -> Work:
    """``[rows, width] · [width, out]``: every operand and the result cross device memory once."""
    size = BYTES[dtype]
    numbers = rows * width + width * out + rows * out
    return Work(name, 2.0 * rows * width * out, UNITS[dtype], hbm=size * numbers, launches=launches)


def pointwise(name: str, read: float, written: float, *, launches: int = 1) -> Work:
    """A kernel that only moves ``read + written`` bytes."""
    return Work(name, hbm=read + written, launches=launches)
