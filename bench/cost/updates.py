"""What a whole training update must do beside its scans: convolutions, heads, losses, imagination, the optimiser.

Backward passes of layers that learn cost twice their forward pass; those that only pass a gradient on cost it once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from bench.cost.machine import Machine
from bench.cost.scan import Scan, observe
from bench.cost.work import BYTES, UNITS, Work, pointwise, product

UNITS_HEAD, LAYERS_HEAD = 400, 4  # BehaviorConfig
ACTION = 4  # Meta-world
QUEUE, PROJECTION, WINDOW = 4096, 128, 5  # VideoBonusConfig
IMAGE = 64 * 64 * 3
OPTIMISER_BYTES = 28  # a weight: read w, g, m, v; write w, m, v; float32


def scan_shape(shape: Mapping[str, int]) -> dict[str, int]:
    """The RSSM of an update's row, categorical as the presets have it."""
    sizes = {name: shape[name] for name in ("B", "T", "deter", "hidden")}
    return sizes | {"E": 32 * shape["cnn_depth"], "A": ACTION, "stoch": 32, "discrete": 32}


def feat(shape: Mapping[str, int]) -> int:
    """Width of the features that heads and decoder read."""
    return 32 * 32 + shape["deter"]


def encoder_layers(depth: int) -> list[tuple[int, int]]:
    """Multiply-adds an image, and weights, of the four convolutions: kernel 4, stride 2, 64 to 31, 14, 6, 2."""
    widths = [3, depth, 2 * depth, 4 * depth, 8 * depth]
    kernels = [16 * before * after for before, after in itertools.pairwise(widths)]
    return [(size * size * kernel, kernel) for size, kernel in zip((31, 14, 6, 2), kernels, strict=True)]


def decoder_layers(depth: int, width: int) -> list[tuple[int, int]]:
    """The same of the decoder: dense, then transposed convolutions from 1 to 5, 13, 30, 64, counted at their input."""
    shapes = ((32, 4, 5, 1), (4, 2, 5, 5), (2, 1, 6, 13))
    kernels = [(depth * a * depth * b * k * k, size) for a, b, k, size in shapes] + [(depth * 3 * 36, 30)]
    return [(width * 32 * depth, width * 32 * depth), *((size * size * kernel, kernel) for kernel, size in kernels)]


def head_weights(width: int, out: int) -> int:
    """Of one of the MLPs."""
    return width * UNITS_HEAD + (LAYERS_HEAD - 1) * UNITS_HEAD**2 + UNITS_HEAD * out


def rssm_weights(scan: Scan) -> int:
    """All of an RSSM's matrices; ``scan.E`` includes what a stack's upper model sees."""
    return sum(scan.weights.values()) + scan.H * (scan.E + 50) + scan.H * (scan.D + scan.M)


def convolutions(layers: list[tuple[int, int]], frames: int, dtype: str, name: str) -> list[Work]:
    """Forward and both gradients of every layer, a launch each."""
    return [Work(name, 2.0 * frames * adds, UNITS[dtype], launches=1, times=3) for adds, _ in layers]


def head(name: str, rows: int, width: int, out: int, dtype: str, *, times: int = 1) -> list[Work]:
    """The layers of one MLP, ``times`` over (3: with both gradients)."""
    widths = [width, *[UNITS_HEAD] * LAYERS_HEAD, out]
    layers = [product(name, rows, before, after, dtype) for before, after in itertools.pairwise(widths)]
    return [replace(layer, times=times) for layer in layers]


def image_loss(frames: int, dtype: str) -> list[Work]:
    """Reconstruction and uint8 frame in, gradient out."""
    return [pointwise("image loss", frames * IMAGE * (BYTES[dtype] + 1), frames * IMAGE * BYTES[dtype])]


def kl(scan: Scan) -> list[Work]:
    """Both logits in, then both gradients out."""
    numbers = scan.B * scan.T * scan.M * 4
    return [pointwise("kl", 2 * numbers, 0), pointwise("kl backward", 2 * numbers, 2 * numbers)]


def optimiser(weights: float) -> list[Work]:
    """Adam with a clip over flat buffers: the norm reads the gradients once before."""
    return [pointwise("norm", 4 * weights, 0), pointwise("adam", OPTIMISER_BYTES * weights, 0)]


def _world(shape: Mapping[str, int], dtype: str) -> list[Work]:
    depth, frames = shape["cnn_depth"], shape["B"] * shape["T"]
    parts = convolutions(encoder_layers(depth), frames, dtype, "encoder")
    parts += convolutions(decoder_layers(depth, feat(shape)), frames, dtype, "decoder")
    return parts + image_loss(frames, dtype)


def _weights(layers: list[tuple[int, int]]) -> int:
    return sum(count for _, count in layers)


def pretrain(shape: Mapping[str, int], dtype: str, machine: Machine) -> list[Work]:
    """``pretrain_update``: encoder, scan, decoder, losses, Adam."""
    scan = Scan.of(scan_shape(shape) | {"A": 0}, dtype)
    weights = _weights(encoder_layers(shape["cnn_depth"])) + _weights(decoder_layers(shape["cnn_depth"], feat(shape)))
    parts = _world(shape, dtype) + observe(scan, machine, backward=True) + kl(scan)
    return parts + optimiser(weights + rssm_weights(scan))


def finetune(
    shape: Mapping[str, int], dtype: str, machine: Machine, scans: list[Work], imagined: list[Work]
) -> list[Work]:
    """``finetune_update`` around its ``scans`` and one ``imagined`` step of B·T rows."""
    rows, horizon, width = shape["B"] * shape["T"], shape["horizon"], feat(shape)
    lower = Scan.of(scan_shape(shape) | {"A": 0}, dtype)
    upper = Scan.of(scan_shape(shape) | {"E": width}, dtype)
    depth, dreams = shape["cnn_depth"], rows * (horizon + 1)
    parts = _world(shape, dtype) + scans + kl(upper) + head("reward", rows, width, 1, dtype, times=3)
    parts += _bonus(shape, width)
    # Behaviour: the roll-out with the actor in the loop; backward through the model for the actor's gradient.
    parts += [*imagined, *head("actor", rows, width, 2 * ACTION, dtype)] * horizon
    parts += [*imagined, *head("actor", rows, width, 2 * ACTION, dtype, times=2)] * horizon
    parts += head("reward", dreams, width, 1, dtype, times=2) + head("slow critic", dreams, width, 1, dtype, times=2)
    parts += head("critic", rows * horizon, width, 1, dtype, times=3)
    parts += head("policy", rows * (horizon - 1), width, 2 * ACTION, dtype, times=3)
    weights = _weights(encoder_layers(depth)) + _weights(decoder_layers(depth, width))
    weights += rssm_weights(lower) + rssm_weights(upper) + 2 * head_weights(width, 1) + head_weights(width, 2 * ACTION)
    return parts + optimiser(weights)


def _bonus(shape: Mapping[str, int], width: int) -> list[Work]:
    """Window mean and projection, distances, the queue."""
    queries = shape["B"] * (shape["T"] - WINDOW + 1)
    distances = Work("distances", 2.0 * queries * QUEUE * PROJECTION, "tf32", launches=2)
    project = product("project", queries, width, PROJECTION, "float32")
    return [project, distances, pointwise("queue", 4.0 * QUEUE * PROJECTION, 4.0 * QUEUE * PROJECTION)]
