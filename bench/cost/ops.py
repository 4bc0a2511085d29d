"""The floor of every benchmarked op, from the shape of its row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

from bench.cost import layers, updates
from bench.cost.machine import Machine
from bench.cost.scan import Scan, observe, prior_head, stacked
from bench.cost.work import BYTES, Floor, Work, pointwise, product, total

Shape = Mapping[str, int]
Parts = Callable[[Shape, str, bool, Machine], list[Work]]  # shape, dtype, with the backward pass?


def _observe(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    return observe(Scan.of(shape, dtype), machine, backward=backward)


def stack_of(shape: Shape, dtype: str) -> tuple[Scan, Scan]:
    """The two models of a stack: all of the upper one's embedding comes from the lower one."""
    return Scan.of({**shape, "A": 0}, dtype), Scan.of({**shape, "E": 0}, dtype)


def _stacked(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    return stacked(*stack_of(shape, dtype), machine, backward=backward)


def imagination_step(scan: Scan, machine: Machine) -> list[Work]:
    """One prior step of B rows: the latents' part of img_in, the GRU and its gates, the prior's head; 5 launches.

    The first is the cheaper of two: the sum of the rows that one-hots pick, from L2, or a product. States and logits
    leave in float32, with a copy of the states in the products' dtype for the next step.
    """
    size = BYTES[scan.dtype]
    traffic = scan.B * (scan.A + scan.H) * size
    gathered = Work("x", l2=scan.B * scan.S * scan.H * size, hbm=traffic, launches=1)
    x = min(
        gathered, product("x", scan.B, scan.L + scan.A, scan.H, scan.dtype), key=lambda w: total([w], machine).seconds
    )
    parts = [x, product("gru", scan.B, scan.H + scan.D, 3 * scan.D, scan.dtype)]
    hidden, dist = prior_head(_one_step(scan))
    if machine.fused:  # in its caches
        return [*parts, hidden, dist]
    gates = pointwise("gates", scan.B * (3 * scan.D * size + 4 * scan.D), scan.B * scan.D * (4 + size))
    return [*parts, gates, hidden, replace(dist, hbm=dist.hbm + scan.B * (4 * scan.M + 4 * scan.L))]


def _one_step(scan: Scan) -> Scan:
    return Scan(scan.B, 1, scan.E, scan.A, scan.D, scan.H, scan.S, scan.C, scan.dtype)


def _policy(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """One posterior step of a stack, without priors, and the actor: every weight is read once.

    Of what sees one-hots, the numbers that they pick.
    """
    lower = Scan.of({**shape, "A": 0, "T": 1}, dtype)
    upper = Scan.of({**shape, "E": updates.feat(shape), "T": 1}, dtype)
    parts: list[Work] = []
    for scan, seen in ((lower, lower.E), (upper, upper.D)):  # the upper one sees the lower one's deter and one-hots
        widths = ((scan.H + scan.D, 3 * scan.D), (scan.D + seen, scan.H), (scan.H, scan.M))
        parts += [product("step", scan.B, width, out, dtype) for width, out in widths]
    rows = lower.S * (lower.H + upper.H + upper.H) + upper.A * upper.H + upper.S * layers.UNITS_HEAD
    parts.append(Work("one-hots", hbm=lower.B * rows * BYTES[dtype]))
    return parts + layers.head("actor", shape["B"], upper.D, 2 * shape["A"], dtype)


def _image_encoder(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """Bytes have no gradient, so with the backward pass the first layer costs twice, not three times as much."""
    convs, frames = layers.encoder_layers(shape["depth"]), shape["B"] * shape["T"]
    return layers.convolutions(convs, frames, dtype, "encoder", machine, backward=backward, of_input=False)


def _image_decoder(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    convs, frames = layers.decoder_layers(shape["depth"], shape["F"]), shape["B"] * shape["T"]
    return layers.convolutions(convs, frames, dtype, "decoder", machine, backward=backward, of_input=True)


def _mlp(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    widths = [shape["F"], *[shape["units"]] * shape["layers"]]
    products = [product("mlp", shape["N"], before, after, dtype) for before, after in itertools.pairwise(widths)]
    return [replace(layer, times=3 if backward else 1) for layer in products]


def _imagine(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """With gradients of the actions only: every product once more, with the weights transposed."""
    scan = Scan.of({"E": 0, **shape}, dtype)
    parts = imagination_step(scan, machine) * scan.T
    if backward:
        back = product("dx", scan.B, scan.H, scan.L, dtype)
        parts += [back, *imagination_step(scan, machine)[1:]] * scan.T
    return parts


def _rollout(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """Imagination with the actor in the loop, see :func:`bench.cost.updates.rollout`."""
    scan = Scan.of({"E": 0, **shape}, dtype)
    return updates.rollout(scan, imagination_step(scan, machine), backward=backward)


def _step(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """One posterior step of B rows: every weight is read once; a launch a phase, and two for the prior."""
    scan = Scan.of({**shape, "T": 1}, dtype)
    widths = ((scan.L + scan.A, scan.H), (scan.H + scan.D, 3 * scan.D), (scan.D + scan.E, scan.H), (scan.H, scan.M))
    return [*(product("step", scan.B, width, out, dtype) for width, out in widths), *prior_head(scan)]


def _knn_bonus(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """Distances by a product in tf32, which leaves k rows a query to look at again exactly.

    The product alone in fp32, without tensor cores, is :func:`knn_in_fp32`.
    """
    q, n, d, k = (shape[name] for name in ("Q", "N", "d", "k"))
    rows = Work("neighbours", 3.0 * q * k * d, "fp32", l2=4.0 * q * k * d, hbm=4.0 * q, launches=1)
    return [Work("filter", 2.0 * q * n * d, "tf32", hbm=4.0 * (q * d + n * d), launches=1), rows]


def knn_in_fp32(shape: Shape) -> list[Work]:
    """All distances as a product in fp32."""
    q, n, d = shape["Q"], shape["N"], shape["d"]
    return [Work("distances", 2.0 * q * n * d, "fp32", hbm=4.0 * (q * d + n * d + q), launches=1)]


def _video_bonus(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """Projection of every step, neighbours of every window, and a new queue beside the old one."""
    b, t, f, n, d = (shape[name] for name in ("B", "T", "F", "N", "d"))
    windows = {"Q": b * (t - updates.WINDOW + 1), "N": n, "d": d, "k": shape["k"]}
    queue = pointwise("queue", 4.0 * n * d, 4.0 * n * d)
    return [product("project", b * t, f, d, dtype), queue, *_knn_bonus(windows, dtype, backward, machine)]


def _image_loss(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """Mean and bytes in; for the gradient both once more, and the gradient out."""
    numbers, size = shape["B"] * shape["T"] * updates.IMAGE, BYTES[dtype]
    parts = [pointwise("forward", numbers * (size + 1), 4)]
    return [*parts, pointwise("backward", numbers * (size + 1), numbers * size)] if backward else parts


def _normalize_image(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    numbers = shape["B"] * shape["T"] * updates.IMAGE
    return [pointwise("normalize", numbers, numbers * BYTES[dtype])]


def _keras_adam(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    """``models`` times the dense layers of an RSSM at full size, with their biases."""
    layers = ((1024, 1074), (3072, 2048), (1024, 1024), (1024, 1024), (1024, 2560), (1024, 1024))
    return updates.optimiser(shape["models"] * sum(rows * (columns + 1) for rows, columns in layers))


def _lambda_return(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    numbers = shape["H"] * shape["N"] * BYTES[dtype]
    parts = [pointwise("forward", 3 * numbers, numbers)]
    return [*parts, pointwise("backward", 4 * numbers, 3 * numbers)] if backward else parts


def _kl_balance(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    rows, last = shape["B"] * shape["T"], shape.get("C", 2)
    numbers = rows * shape["S"] * last * BYTES[dtype]
    parts = [pointwise("forward", 2 * numbers, 4 * rows)]
    return [*parts, pointwise("backward", 2 * numbers, 2 * numbers)] if backward else parts


def _pretrain(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    return updates.pretrain(shape, dtype, machine)


def _finetune(shape: Shape, dtype: str, backward: bool, machine: Machine) -> list[Work]:
    scans = stack_of(updates.scan_shape(shape), dtype)
    start = Scan.of({**updates.scan_shape(shape), "B": shape["B"] * shape["T"], "T": 1}, dtype)
    return updates.finetune(
        shape, dtype, machine, stacked(*scans, machine, backward=True), imagination_step(start, machine)
    )


PARTS: dict[str, Parts] = {
    "rssm_observe": _observe,
    "observe_sweep": _observe,
    "stacked_observe": _stacked,
    "rssm_imagine": _imagine,
    "rssm_rollout": _rollout,
    "rssm_step": _step,
    "policy": _policy,
    "mlp": _mlp,
    "image_encoder": _image_encoder,
    "image_decoder": _image_decoder,
    "knn_bonus": _knn_bonus,
    "video_bonus": _video_bonus,
    "image_loss": _image_loss,
    "normalize_image": _normalize_image,
    "keras_adam": _keras_adam,
    "lambda_return": _lambda_return,
    "kl_balance": _kl_balance,
    "kl_balance_normal": _kl_balance,
    "pretrain_update": _pretrain,
    "finetune_update": _finetune,
}


def floor(op: str, shape: Shape, dtype: str, passed: str, machine: Machine) -> Floor | None:
    """The least time of one row of a benchmark, or None for an op or a shape that the model does not know."""
    if op not in PARTS:
        return None
    try:
        parts = PARTS[op](shape, dtype, passed == "forward_backward", machine)
    except KeyError:  # a size is missing
        return None
    return total(parts, machine)
