"""Convolutions and multilayer perceptrons, layer by layer, with what runs between the layers.

A convolution's bias and ELU, their gradients and a head's ELU are passes over memory of their own where cuDNN and
cuBLAS do the products (:attr:`bench.cost.machine.Machine.fused` is false); our code for CPUs does them on the way.
Backward passes of layers that learn cost twice their forward pass; those that only pass a gradient on cost it once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.cost.machine import Machine
from bench.cost.work import BYTES, UNITS, Work, pointwise, product

UNITS_HEAD, LAYERS_HEAD = 400, 4  # BehaviorConfig
SIDES_IN, SIDES_OUT = (64, 31, 14, 6), (31, 14, 6, 2)  # of the encoder's images


class Layer(NamedTuple):
    """Of one image: multiply-adds; weights; numbers read and written; whether an ELU follows, and a bias is added."""

    adds: int
    weights: int
    read: int
    written: int
    elu: bool = True
    dense: bool = False  # a product, whose bias rides on it everywhere


def encoder_layers(depth: int) -> list[Layer]:
    """The four convolutions: kernel 4, stride 2."""
    widths = [3, depth, 2 * depth, 4 * depth, 8 * depth]
    layers = []
    for before, after, side, side_out in zip(widths, widths[1:], SIDES_IN, SIDES_OUT, strict=False):
        kernel = 16 * before * after
        layers.append(Layer(side_out * side_out * kernel, kernel, side * side * before, side_out * side_out * after))
    return layers


def decoder_layers(depth: int, width: int) -> list[Layer]:
    """Dense, then transposed convolutions from 1 to 5, 13, 30, 64; the first of them, of one pixel, is a product."""
    layers = [Layer(width * 32 * depth, width * 32 * depth, width, 32 * depth, elu=False, dense=True)]
    widths, sides = (32 * depth, 4 * depth, 2 * depth, depth, 3), (1, 5, 13, 30, 64)
    for i, size in enumerate((5, 5, 6, 6)):
        weights = widths[i] * widths[i + 1] * size * size
        adds = weights * sides[i] ** 2  # each pixel that is read goes to kernel² pixels
        read, written = widths[i] * sides[i] ** 2, widths[i + 1] * sides[i + 1] ** 2
        layers.append(Layer(adds, weights, read, written, elu=i < 3, dense=i == 0))
    return layers


def weights_of(layers: Sequence[Layer]) -> int:
    """Without biases."""
    return sum(layer.weights for layer in layers)


def convolutions(
    layers: Sequence[Layer], frames: int, dtype: str, name: str, machine: Machine, *, backward: bool, of_input: bool
) -> list[Work]:
    """Every layer and, with ``backward``, all gradients; ``of_input``: the first layer's input has one too."""
    parts: list[Work] = []
    for i, layer in enumerate(layers):
        passes = 1 + backward * (2 if i > 0 or of_input else 1)
        parts.append(replace(_pass(layer, frames, dtype, name, machine), times=passes))
        parts += [] if machine.fused else _between(layer, frames, dtype, name, backward=backward)
    return parts


def _pass(layer: Layer, frames: int, dtype: str, name: str, machine: Machine) -> Work:
    numbers = 0 if machine.fused else frames * (layer.read + layer.written) + layer.weights
    flops, crossed = 2.0 * frames * layer.adds, BYTES[dtype] * numbers
    return Work(name, flops, UNITS[dtype], hbm=crossed, launches=1, convolution=not layer.dense)


def _between(layer: Layer, frames: int, dtype: str, name: str, *, backward: bool) -> list[Work]:
    """Bias and ELU read and write the layer's output; back, ELU reads two and writes one, the bias's sum reads one."""
    written = BYTES[dtype] * frames * layer.written
    parts = [] if layer.dense else [pointwise(f"{name}: bias", written, written)]
    parts += [pointwise(f"{name}: ELU", written, written)] if layer.elu else []
    if backward:
        parts += [pointwise(f"{name}: ELU back", 2 * written, written)] if layer.elu else []
        parts.append(pointwise(f"{name}: bias back", written, 0))
    return parts


def head_weights(width: int, out: int) -> int:
    """Of one of the MLPs."""
    return width * UNITS_HEAD + (LAYERS_HEAD - 1) * UNITS_HEAD**2 + UNITS_HEAD * out


def head(
    name: str, rows: int, width: int, out: int, dtype: str, machine: Machine | None = None, *, times: int = 1
) -> list[Work]:
    """The layers of one MLP, ``times`` over: 2 with the gradient of its input, 3 with both.

    Without ``machine``, or on one that fuses, ELU and biases cost nothing of their own.
    """
    widths = [width, *[UNITS_HEAD] * LAYERS_HEAD, out]
    parts = [product(name, rows, before, after, dtype) for before, after in itertools.pairwise(widths)]
    parts = [replace(layer, times=times) for layer in parts]
    if machine is None or machine.fused:
        return parts
    size = BYTES[dtype] * rows * UNITS_HEAD
    elu = [pointwise(f"{name}: ELU", size, size)]
    elu += [pointwise(f"{name}: ELU back", 2 * size, size)] * (times > 1) + [pointwise(name, size, 0)] * (times > 2)
    return parts + elu * LAYERS_HEAD
