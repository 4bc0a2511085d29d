"""The scan of one RSSM and of two stacked, phase by phase as ``apv_fast.recurrence.phases`` lists them.

A persistent scan keeps its weights on the SMs, columns dealt out, so every SM needs the whole input vector of every
product: ``SMs · B · width`` numbers cross from L2 in each phase. That, the barriers and, where the weights do not fit
on the SMs, streaming the rest of them at every step, is what a step costs. Weight gradients and all that does not
depend on the step before are products over all B·T, outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.cost.machine import Machine
from bench.cost.work import BYTES, UNITS, Work, product

STATE = 4  # bytes of a number in states and statistics
INDEX = 4  # bytes of the index of a sampled class
TILE = 8  # bytes of a tile's (mean, M2) or of its two sums


@dataclass(frozen=True)
class Scan:
    """Sizes of one model and its batch, and on how many of the SMs it runs."""

    B: int
    T: int
    E: int
    A: int
    D: int
    H: int
    S: int
    C: int
    dtype: str = "bfloat16"
    share: float = 1.0  # of the SMs, as a stack deals them out
    link: int = 0  # weights between the two models of a stack that it keeps too
    persistent: bool = True  # else one launch a phase, and nothing stays on the SMs

    @classmethod
    def of(cls, shape: Mapping[str, int], dtype: str) -> Scan:
        """From the shape of a benchmark's row."""
        names = {"D": "deter", "H": "hidden", "S": "stoch", "C": "discrete"}
        b, t, e, a, d, h, s, c = (shape[names.get(name, name)] for name in "BTEADHSC")
        return cls(b, t, e, a, d, h, s, c, dtype)

    @property
    def L(self) -> int:
        """Width of the latent."""
        return self.S * (self.C or 1)

    @property
    def M(self) -> int:
        """Width of its statistics."""
        return self.S * (self.C or 2)

    @property
    def weights(self) -> dict[str, int]:
        """How many weights each phase of a step reads."""
        gru = 3 * self.D * (self.H + self.D)
        return {"stoch": self.L * self.H, "gru": gru, "obs": self.H * self.D, "dist": self.M * self.H}

    @property
    def recurrent_bytes(self) -> int:
        """Of the weights that every step reads."""
        return BYTES[self.dtype] * (sum(self.weights.values()) + self.link)

    def streamed(self, machine: Machine) -> float:
        """The share of the recurrent weights that every step reads again, because the SMs cannot keep it."""
        if not self.persistent:
            return 1.0
        return max(0.0, 1 - machine.resident * machine.sms * self.share / self.recurrent_bytes)


def _phase(scan: Scan, machine: Machine, name: str, weights: str, width: float, hbm: float = 0.0) -> Work:
    """A product whose input of ``width`` numbers a row every SM reads."""
    size, sms = BYTES[scan.dtype], machine.sms * scan.share
    count = scan.weights[weights]
    l2 = sms * scan.B * width * size + scan.streamed(machine) * count * size
    # A stack's half has half the SMs, so its share of their shared memory takes twice the time.
    shared = size * count / scan.share
    flops = 2 * scan.B * count / scan.share
    return Work(name, flops, UNITS[scan.dtype], hbm=hbm * scan.B, l2=l2, shared=shared, barriers=1)


def forward_step(scan: Scan, machine: Machine) -> list[Work]:
    """The five phases of a forward step."""
    size, sms = BYTES[scan.dtype], machine.sms * scan.share
    gathered = scan.B * scan.S * scan.H * size  # S rows of img_in's columns for every row of the batch
    if scan.C:
        streamed = scan.streamed(machine)
        x = Work("x", l2=sms * scan.B * scan.S * INDEX + streamed * gathered, shared=gathered / scan.share, barriers=1)
    else:
        x = _phase(scan, machine, "x", "stoch", scan.L)
    gates = sms * scan.B * sms * TILE
    return [
        replace(x, hbm=2.0 * scan.B * scan.H * size),
        _phase(scan, machine, "gru", "gru", scan.H + scan.D, hbm=3 * scan.D * STATE),
        Work("gates", hbm=scan.B * scan.D * STATE, l2=gates, barriers=1),
        _phase(scan, machine, "obs", "obs", scan.D, hbm=2 * scan.H * size),
        _phase(scan, machine, "dist", "dist", scan.H, hbm=(scan.M + scan.L) * STATE),
    ]


def backward_step(scan: Scan, machine: Machine) -> list[Work]:
    """The five phases of a reverse step: those of `apv_fast.recurrence.phases`, the fourth in two, as on a GPU.

    What LayerNorm's gradient makes is stored once, and every SM reads it.
    """
    size, sms = BYTES[scan.dtype], machine.sms * scan.share
    saved = (2 * scan.D + 3 * scan.D) * STATE  # deter, its gradient, and what LayerNorm saw
    scaled = 3 * scan.D * STATE  # the gradient before LayerNorm, left by the phase before
    return [
        _phase(scan, machine, "dz", "stoch", scan.H, hbm=(2 * scan.M + scan.L) * STATE + scan.M * size),
        _phase(scan, machine, "dy", "dist", scan.M, hbm=2 * scan.H * size),
        _phase(scan, machine, "dh", "obs", scan.H, hbm=saved),
        Work("norm", hbm=scan.B * 3 * scan.D * (STATE + size), l2=scan.B * (scaled + sms * sms * TILE), barriers=1),
        _phase(scan, machine, "dparts", "gru", 3 * scan.D, hbm=2 * scan.H * size),
    ]


def before_and_after(scan: Scan, *, head: bool = True) -> list[Work]:
    """Forward work outside of the recurrence: loading the weights, the embedding's and action's part, the prior."""
    rows, dtype = scan.B * scan.T, scan.dtype
    parts = [Work("weights", hbm=scan.recurrent_bytes, launches=1)]
    parts += [product("embed", rows, scan.E, scan.H, dtype)] if scan.E else []
    parts += [product("action", rows, scan.A, scan.H, dtype)] if scan.A else []
    return parts + (prior_head(scan) if head else [])


def prior_head(scan: Scan) -> list[Work]:
    """The prior of every step."""
    rows = scan.B * scan.T
    return [
        product("img_out", rows, scan.D, scan.H, scan.dtype),
        product("img_dist", rows, scan.H, scan.M, scan.dtype),
    ]


def gradients_outside(scan: Scan) -> list[Work]:
    """Backward work outside of the recurrence: the prior's head, every weight's gradient, the embedding's."""
    rows, dtype = scan.B * scan.T, scan.dtype
    weights = {
        "stoch": (scan.L, scan.H),
        "gru": (scan.H + scan.D, 3 * scan.D),
        "obs": (scan.D + scan.E, scan.H),
        "dist": (scan.H, scan.M),
        "img_out": (scan.D, scan.H),
        "img_dist": (scan.H, scan.M),
    }
    parts = [product(f"d{name}", width, rows, out, dtype) for name, (width, out) in weights.items()]
    parts += [product("daction", scan.A, rows, scan.H, dtype)] if scan.A else []
    parts += [product("dhead", rows, scan.M, scan.H, dtype), product("dhidden", rows, scan.H, scan.D, dtype)]
    return parts + ([product("dembed", rows, scan.H, scan.E, dtype)] if scan.E else [])


def _repeat(steps: list[Work], times: int, *, persistent: bool = True) -> list[Work]:
    steps = [replace(step, times=times) for step in steps]
    return steps if persistent else [replace(step, launches=step.barriers, barriers=0) for step in steps]


def observe(scan: Scan, machine: Machine, *, backward: bool) -> list[Work]:
    """``rssm_observe``: the recurrence, and the products around it."""
    keep = scan.persistent
    parts = [*before_and_after(scan), *_repeat(forward_step(scan, machine), scan.T, persistent=keep)]
    if backward:
        parts += [Work("weights", hbm=scan.recurrent_bytes, launches=1)]
        parts += _repeat(backward_step(scan, machine), scan.T, persistent=keep)
        parts += gradients_outside(scan)
    return parts


def _link(upper: Scan, lower: Scan) -> list[Work]:
    """What the upper model sees of the lower one, as products over all steps: width of its features."""
    return [product("link", upper.B * upper.T, lower.L + lower.D, upper.H, upper.dtype)]


def two_scans(lower: Scan, upper: Scan, machine: Machine, *, backward: bool) -> list[Work]:
    """``stacked_observe`` as one scan after the other: 2T rounds."""
    parts = observe(lower, machine, backward=backward) + observe(upper, machine, backward=backward)
    return parts + _link(upper, lower) * (3 if backward else 1)


def stacked(lower: Scan, upper: Scan, machine: Machine, *, backward: bool) -> list[Work]:
    """``stacked_observe`` as a wavefront: T + 1 rounds of both models' phases, each on half of the SMs."""
    link = (lower.L + lower.D) * upper.H
    below, above = replace(lower, share=0.5), replace(upper, share=0.5, link=link)
    x, gru, gates, obs, dist = forward_step(above, machine)
    obs = _linked(obs, above, machine, lower.D, lower.D * upper.H)
    obs = replace(obs, l2=obs.l2 + machine.sms * above.share * lower.B * lower.S * INDEX)
    parts = before_and_after(below) + before_and_after(above)
    parts += _repeat(_rounds(forward_step(below, machine), [x, gru, gates, obs, dist]), lower.T + 1)
    if not backward:
        return parts
    below, above = replace(below, link=link), replace(above, link=0)  # now the lower one reads through the link
    dz, dy, dh, *rest = backward_step(below, machine)
    dz = _linked(dz, below, machine, upper.H, lower.L * upper.H)
    dh = _linked(dh, below, machine, upper.H, lower.D * upper.H)
    parts += [Work("weights", hbm=below.recurrent_bytes + above.recurrent_bytes, launches=1)]
    parts += _repeat(_rounds([dz, dy, dh, *rest], backward_step(above, machine)), lower.T + 1)
    return [*parts, *gradients_outside(below), *gradients_outside(above), *_link(upper, lower)]


def _linked(phase: Work, scan: Scan, machine: Machine, width: int, weights: int) -> Work:
    """``phase`` of ``scan`` with a product more, from ``width`` numbers a row of the other model."""
    size, sms = BYTES[scan.dtype], machine.sms * scan.share
    return replace(
        phase,
        flops=phase.flops + 2 * scan.B * weights / scan.share,
        l2=phase.l2 + sms * scan.B * width * size + scan.streamed(machine) * weights * size,
        shared=phase.shared + size * weights / scan.share,
    )


def _rounds(lower: list[Work], upper: list[Work]) -> list[Work]:
    """Phases side by side on their own SMs: bytes from L2 and HBM add up, the rest is that of the slower one."""
    return [
        replace(
            one,
            flops=max(one.flops, two.flops),
            shared=max(one.shared, two.shared),
            hbm=one.hbm + two.hbm,
            l2=one.l2 + two.l2,
        )
        for one, two in zip(lower, upper, strict=True)
    ]
