"""What a whole training update must do beside its scans: convolutions, heads, losses, imagination, the optimiser.

Launches that no part has (casts of weights and gradients, masks, metrics, clocks) were counted, not derived: see
:data:`LAUNCHES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.cost.layers import convolutions, decoder_layers, encoder_layers, head, head_weights, weights_of
from bench.cost.machine import Machine
from bench.cost.scan import Scan, observe
from bench.cost.work import BYTES, Work, pointwise, product

ACTION = 4  # Meta-world
QUEUE, PROJECTION, WINDOW = 4096, 128, 5  # VideoBonusConfig
IMAGE = 64 * 64 * 3
OPTIMISER_BYTES = 28  # a weight: read w, g, m, v; write w, m, v; float32
CAST_BYTES = 6  # a weight from float32 to bfloat16, or its gradient back
# Kernels of a whole update in bfloat16, horizon 15: torch's profiler around one on the GPU that is not there
# (tests/fake_gpu) saw 230 and 883 of PyTorch's and 15 and 286 of Triton; 20 biases and gradients only a GPU launches.
LAUNCHES = {"pretrain": 265, "finetune": 1189}


def scan_shape(shape: Mapping[str, int]) -> dict[str, int]:
    """The RSSM of an update's row, categorical as the presets have it."""
    sizes = {name: shape[name] for name in ("B", "T", "deter", "hidden")}
    return sizes | {"E": 32 * shape["cnn_depth"], "A": ACTION, "stoch": 32, "discrete": 32}


def feat(shape: Mapping[str, int]) -> int:
    """Width of the features that heads and decoder read."""
    return 32 * 32 + shape["deter"]


def rssm_weights(scan: Scan) -> int:
    """All of an RSSM's matrices; ``scan.E`` includes what a stack's upper model sees."""
    return sum(scan.weights.values()) + scan.H * (scan.E + 50) + scan.H * (scan.D + scan.M)


def image_loss(frames: int, dtype: str, machine: Machine) -> list[Work]:
    """Reconstruction and uint8 frame in, gradient out; both are read again for it where its factor is not known yet."""
    read, written = frames * IMAGE * (BYTES[dtype] + 1), frames * IMAGE * BYTES[dtype]
    if machine.fused:
        return [pointwise("image loss", read, written)]
    return [pointwise("image loss", read, 0), pointwise("image loss back", read, written)]


def kl(scan: Scan) -> list[Work]:
    """Both logits in, then both gradients out."""
    numbers = scan.B * scan.T * scan.M * 4
    return [pointwise("kl", 2 * numbers, 0), pointwise("kl backward", 2 * numbers, 2 * numbers)]


def optimiser(weights: float) -> list[Work]:
    """Adam with a clip over flat buffers: the norm reads the gradients once before."""
    return [pointwise("norm", 4 * weights, 0), pointwise("adam", OPTIMISER_BYTES * weights, 0)]


def casts(weights: float, dtype: str, machine: Machine, *, copied: float) -> list[Work]:
    """Weights to the products' dtype and all gradients back; their launches are among :data:`LAUNCHES`.

    ``copied`` of the weights have copies in that dtype, which the optimiser writes where it writes the weights.
    """
    if dtype != "bfloat16" or machine.fused:
        return []
    there = Work("weights to bf16", hbm=CAST_BYTES * (weights - copied) + BYTES[dtype] * copied)
    return [there, Work("gradients from bf16", hbm=CAST_BYTES * weights)]


def features(
    rows: float, width: int, dtype: str, machine: Machine, *, readers: float, differentiated: int
) -> list[Work]:
    """Float32 features of ``rows`` states: put together, rounded for each of ``readers``; some hand a gradient back.

    A reader reads 4 bytes and writes 2 a number; a gradient back reads 2 and writes 4, and all of them are summed.
    """
    if machine.fused:
        return []
    numbers, size = rows * width, BYTES[dtype]
    parts = [pointwise("features", 4 * numbers, 4 * numbers)]
    if size < 4:
        parts.append(Work("features rounded", hbm=(4 + size) * numbers * readers))
        parts.append(Work("features back", hbm=(4 + size) * numbers * differentiated))
    return [*parts, Work("features' sum", hbm=12 * numbers * (differentiated - 1))]


def rest(parts: list[Work], kind: str) -> list[Work]:
    """The launches of small tensors: those that were counted and that ``parts`` do not have."""
    return [Work("small tensors", launches=max(0, LAUNCHES[kind] - sum(part.launches * part.times for part in parts)))]


def _world(shape: Mapping[str, int], dtype: str, machine: Machine) -> list[Work]:
    """Images in, loss out; what crosses device memory beside."""
    depth, frames = shape["cnn_depth"], shape["B"] * shape["T"]
    encoder, decoder = encoder_layers(depth), decoder_layers(depth, feat(shape))
    parts = convolutions(encoder, frames, dtype, "encoder", machine, backward=True, of_input=False)
    parts += convolutions(decoder, frames, dtype, "decoder", machine, backward=True, of_input=True)
    if not machine.fused:  # the batch, to where it is read, and its images as the encoder reads them
        parts += [pointwise("batch", frames * IMAGE, frames * IMAGE)]
        parts += [pointwise("normalize", frames * IMAGE, frames * IMAGE * BYTES[dtype])]
    return parts + image_loss(frames, dtype, machine)


def _convolution_weights(shape: Mapping[str, int]) -> int:
    depth = shape["cnn_depth"]
    return weights_of(encoder_layers(depth)) + weights_of(decoder_layers(depth, feat(shape)))


def pretrain(shape: Mapping[str, int], dtype: str, machine: Machine) -> list[Work]:
    """``pretrain_update``: encoder, scan, decoder, losses, Adam."""
    scan = Scan.of(scan_shape(shape) | {"A": 0}, dtype)
    weights = _convolution_weights(shape) + rssm_weights(scan)
    parts = _world(shape, dtype, machine) + observe(scan, machine, backward=True) + kl(scan)
    parts += features(scan.B * scan.T, feat(shape), dtype, machine, readers=1, differentiated=1)
    parts += optimiser(weights) + casts(weights, dtype, machine, copied=rssm_weights(scan))
    return parts if machine.fused else parts + rest(parts, "pretrain")


def finetune(
    shape: Mapping[str, int], dtype: str, machine: Machine, scans: list[Work], imagined: list[Work]
) -> list[Work]:
    """``finetune_update`` around its ``scans`` and one ``imagined`` step of B·T rows."""
    rows, width = shape["B"] * shape["T"], feat(shape)
    lower = Scan.of(scan_shape(shape) | {"A": 0}, dtype)
    upper = Scan.of(scan_shape(shape) | {"E": width}, dtype)
    parts = _world(shape, dtype, machine) + scans + kl(lower) + kl(upper) + _bonus(shape, width)
    parts += features(2 * rows, width, dtype, machine, readers=1, differentiated=1)
    parts += head("reward", rows, width, 1, dtype, machine, times=3) + _behaviour(shape, dtype, machine, imagined)
    weights = _convolution_weights(shape) + rssm_weights(lower) + rssm_weights(upper)
    weights += 2 * head_weights(width, 1) + head_weights(width, 2 * ACTION)
    parts += optimiser(weights) + casts(weights, dtype, machine, copied=weights - _convolution_weights(shape))
    return parts if machine.fused else parts + rest(parts, "finetune")


def rollout(scan: Scan, imagined: list[Work], *, backward: bool) -> list[Work]:
    """``imagined``, a step of B rows, T times with the actor in the loop.

    Its gradient goes through the model, and from all steps at once to the actor's weights; the actor's input gets none.
    """
    actor = head("actor", scan.B, scan.L + scan.D, 2 * scan.A, scan.dtype)
    parts = [*imagined, *actor] * scan.T
    if backward:
        parts += imagined * scan.T + head("actor", scan.B * scan.T, scan.L + scan.D, 2 * scan.A, scan.dtype, times=2)
    return parts


def _behaviour(shape: Mapping[str, int], dtype: str, machine: Machine, imagined: list[Work]) -> list[Work]:
    """The roll-out, forward and back; then the heads.

    Reward, slow critic, policy and critic read the features of H + 1, H + 1, H − 1 and H states; the first two hand
    gradients back.
    """
    rows, horizon, width = shape["B"] * shape["T"], shape["horizon"], feat(shape)
    start = Scan.of(scan_shape(shape) | {"B": rows, "T": horizon}, dtype)
    dreams = rows * (horizon + 1)
    parts = rollout(start, imagined, backward=True)
    readers = 2 + (2 * horizon - 1) / (horizon + 1)
    parts += features(dreams, width, dtype, machine, readers=readers, differentiated=2)
    parts += [] if machine.fused else [pointwise("start and states", 4.0 * dreams * width, 4.0 * dreams * width)]
    for name in ("reward", "slow critic"):
        parts += head(name, dreams, width, 1, dtype, machine, times=2)
    parts += head("critic", rows * horizon, width, 1, dtype, machine, times=3)
    return parts + head("policy", rows * (horizon - 1), width, 2 * ACTION, dtype, machine, times=3)


def _bonus(shape: Mapping[str, int], width: int) -> list[Work]:
    """Window mean and projection, distances, the queue."""
    queries = shape["B"] * (shape["T"] - WINDOW + 1)
    distances = Work("distances", 2.0 * queries * QUEUE * PROJECTION, "tf32", launches=2)
    project = product("project", queries, width, PROJECTION, "float32")
    return [project, distances, pointwise("queue", 4.0 * QUEUE * PROJECTION, 4.0 * QUEUE * PROJECTION)]
