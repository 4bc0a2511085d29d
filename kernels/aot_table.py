"""What :mod:`apv_fast.kernels.aot` compiles: every kernel at production sizes, a chip an architecture."""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from apv_fast.types import Latent

from .aot_imagination import imagination
from .parts.scan_arguments import WARPS, Backward, Forward, LinkBackward, LinkForward, make_shape, stacked_registers
from .parts.scan_arguments import Device as Chip

# Multiprocessors and shared memory of a chip; sm_80 and sm_90 share an H100's number and an A100's memory.
CHIPS = {
    80: Chip(132, 163 * 1024, False, 8),
    90: Chip(132, 163 * 1024, False, 9),
    100: Chip(148, 227 * 1024, False, 10),  # B200
    120: Chip(170, 99 * 1024, False, 12),  # RTX 5090
}


@dataclass(frozen=True)
class Kernel:
    """One compilation: a kernel, the types of its arguments and its compile-time arguments."""

    name: str  # unique in a table
    target: str  # "module:function"; imported only to compile
    # argument -> Triton type ("*bf16", "i32"), or a named tuple of them with None for what is not given
    signature: Mapping[str, str | tuple[str | None, ...]]
    constants: Mapping[str, Any]  # compile-time arguments
    aligned: frozenset[str] = frozenset()  # arguments that are multiples of 16 (bytes for pointers), tuples throughout
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages


def _lambda_return() -> Iterator[Kernel]:
    """Horizon 15 in every dtype, rows contiguous (stride 1 is a compile-time argument, as at run time)."""
    forward = ("reward", "value", "discount", "bootstrap", "returns")
    gradients = ("grad_reward", "grad_value", "grad_discount", "grad_bootstrap")
    backward = ("grad_returns", "value", "discount", "bootstrap", "returns", *gradients)
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        for direction, pointers in (("forward", forward), ("backward", backward)):
            strided = [name for name in pointers[:3]]
            units = [f"{name}_n" for name in (*strided, "bootstrap")]
            constants = {"H": 15, "LAMBDA": 0.95, "ACC": "fp64" if dtype == "fp64" else "fp32", "BLOCK": 64, "ROWS": 15}
            yield Kernel(
                name=f"lambda_return.{direction}.{dtype}",
                target=f"apv_fast.kernels.lambda_return:{direction}_kernel",
                signature={name: f"*{dtype}" for name in pointers} | {"n": "i32"} | {f"{s}_t": "i32" for s in strided},
                constants=constants | dict.fromkeys(units, 1),
                aligned=frozenset(pointers),
                options={"num_warps": 2},
            )


def _kl_balance() -> Iterator[Kernel]:
    """Latents of full size, 50 x 50 steps, logits (or statistics) contiguous, in float32 and bfloat16."""
    target = "apv_fast.kernels.kl_balance"
    sizes = {"categorical": {"S": 32, "C": 32, "BS": 32, "BC": 32}, "normal": {"S": 32, "BS": 32}}
    names = {"categorical": ("p", "q"), "normal": ("p_mean", "p_std", "q_mean", "q_std")}
    short = {"categorical": ("p", "q"), "normal": ("pm", "ps", "qm", "qs")}
    weights = {"P_WEIGHT": 0.2, "Q_WEIGHT": 0.8, "FREE": 0.0, "PER_STEP": False}
    for dtype, kind in itertools.product(("fp32", "bf16"), sizes):
        inputs = dict.fromkeys(names[kind], f"*{dtype}")
        last = "c" if kind == "categorical" else "s"
        strides = {f"{name}_{axis}": "i32" for name in short[kind] for axis in "bts" if axis != last}
        constants = sizes[kind] | {"ACC": "fp32"} | {f"{name}_{last}": 1 for name in short[kind]}
        gradients = {f"grad_{name}": f"*{dtype}" for name in names[kind]}
        forward = inputs | {"value": "*fp32"}
        backward = {"grad": "*fp32"} | forward | {"mean": "*fp32"} | gradients
        for direction, pointers in (("forward", forward), ("backward", backward)):
            yield Kernel(
                name=f"kl_balance.{kind}.{direction}.{dtype}",
                target=f"{target}:{kind}_{direction}_kernel",
                signature=pointers | strides | {"T": "i32"},
                constants=constants | (weights if direction == "backward" else {}),
                aligned=frozenset([*pointers, *strides]),
                options={"num_warps": 4 if kind == "categorical" else 1},
            )
    yield Kernel(
        name="kl_balance.finish",
        target=f"{target}:finish_kernel",
        signature={"value": "*fp32", "loss": "*fp32", "mean": "*fp32", "n": "i32"},
        constants={"FREE": 0.0, "PER_STEP": False, "ACC": "fp32", "BLOCK": 1024},
        aligned=frozenset({"value", "loss", "mean"}),
    )


def _rssm_types(kind: type[tuple[Any, ...]], dtype: str) -> tuple[str | None, ...]:
    """Types of the fields of Forward and Backward for weights of ``dtype``, one-hot latents, noise from a seed."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    states = ("start", "deter", "stoch", "stats", "parts", "norm", "sums", "carry", "dnorm", "dscaled", "direct")
    types = dict.fromkeys(states, f"*{wide}") | {"keep": "*u8", "noise": "*i64", "sample": "*i32"}
    types |= {f"of_{name}": f"*{wide}" for name in ("deter", "stoch", "stats")}
    return kind(*(types.get(name, f"*{dtype}") for name in kind._fields))  # type: ignore[attr-defined]


def _rssm(chip: Chip) -> Iterator[Kernel]:
    """Full size, 16 and 50 sequences, in the chip's tiles."""
    latent = Latent(32, 32)
    cooperative = {"num_warps": WARPS, "launch_cooperative_grid": True}
    single, stacked = "apv_fast.kernels.rssm_observe", "apv_fast.kernels.stacked_observe"
    for name, batch in (("bf16", 16), ("bf16", 50), ("tf32", 50), ("fp32", 50)):
        dtype, precision = ("bf16" if name == "bf16" else "fp32"), ("tf32" if name == "tf32" else "ieee")
        z = make_shape(1024, 1024, latent, batch, 2 if dtype == "bf16" else 4, "seed", precision, chip)
        for direction, kind, link in (("forward", Forward, LinkForward), ("backward", Backward, LinkBackward)):
            argument, types = "f" if direction == "forward" else "g", _rssm_types(kind, dtype)
            sizes = {"B": "i32", "T": "i32"}
            yield Kernel(
                name=f"rssm.{direction}.{name}.B{batch}",
                target=f"{single}:{direction}_kernel",
                signature={"counter": "*i32"} | sizes | {argument: types},
                constants={"z": z},
                aligned=frozenset({"counter", argument}),
                options=cooperative,
            )
            if name != "bf16":
                continue
            registers = stacked_registers(chip)[direction == "backward"]
            yield Kernel(
                name=f"rssm.stacked.{direction}.{name}.B{batch}",
                target=f"{stacked}:{direction}_kernel",
                signature={"counter": "*i32"}
                | sizes
                | {"lower": types, "upper": types, "link": _rssm_types(link, dtype)},
                constants={"zl": z, "zu": z},
                aligned=frozenset({"counter", "lower", "upper", "link"}),
                options=cooperative | ({"maxnreg": registers} if registers else {}),
            )
            for phase in range(1, 6) if batch == 16 else ():
                yield Kernel(
                    name=f"rssm.{direction}.phase{phase}.{name}",
                    target=f"{single}:{direction}_phase_kernel",
                    signature={"t": "i32"} | sizes | {argument: types},
                    constants={"z": z, "PHASE": phase},
                    aligned=frozenset({argument}),
                    options={"num_warps": WARPS},
                )


def _knn_bonus() -> Iterator[Kernel]:
    """The bonus of 50 x 46 windows and a queue of 4096 x 128, and the largest sizes that the filter takes."""
    pointers = ("query", "keys", "filled", "kept", "result", "unproven")
    strides = ("query_0", "query_1", "keys_0", "keys_1")
    sizes: dict[str, str] = dict.fromkeys(("q", "n", "splits", "k", "d", "mean", *strides), "i32")
    unit = {"query_1": 1, "keys_1": 1}  # specialized in the filter only

    def row(kind: str, label: str, dtype: str, warps: int, **constants: Any) -> Kernel:
        types = {"query": f"*{dtype}", "keys": f"*{dtype}", "filled": "*i64", "kept": "*i32", "unproven": "*i32"}
        types["result"] = "*fp64" if dtype == "fp64" else "*fp32"
        filtering = kind == "filter"
        return Kernel(
            name=f"knn_bonus.{kind}.{label}",
            target=f"apv_fast.kernels.parts.knn_select:{kind}_kernel",
            signature={name: types[name] for name in pointers} | sizes,
            constants={"HAS_FILLED": True, "EXCLUDE_SELF": False} | (unit if filtering else {}) | constants,
            aligned=frozenset([*pointers, *(("query_0", "keys_0") if filtering else ())]),
            options={"num_warps": warps},
        )

    blocks = {"FULL": True, "BM": 64, "BN": 64, "BD": 64, "ROUNDS": 3}
    for dtype in ("fp32", "bf16"):
        yield row("filter", dtype, dtype, 4, K=16, CHUNKS=2, **blocks)
    yield row("filter", "others", "fp32", 4, K=16, CHUNKS=2, **(blocks | {"FULL": False, "EXCLUDE_SELF": True}))
    yield row("filter", "largest", "fp32", 8, K=64, CHUNKS=4, **blocks)
    yield row("verify", "fp32", "fp32", 1, K=16, BQ=1, BS=16, BK=16, BD=128)
    yield row("verify", "largest", "fp32", 1, K=64, BQ=1, BS=16, BK=64, BD=256)
    scan = {"BQ": 4, "BN": 32, "BD": 128, "CHUNKS": 1}
    yield row("scan", "fp32", "fp32", 8, BK=16, MARKED=True, ACC="fp32", **scan)
    yield row("scan", "fp64", "fp64", 8, BK=16, MARKED=False, ACC="fp64", **(scan | {"BN": 16}))
    yield row("scan", "large", "fp32", 8, BK=1024, MARKED=False, ACC="fp32", **(scan | {"CHUNKS": 4}))
    push: dict[str, str] = dict.fromkeys(("projected", "queue", "pushed"), "*fp32")
    push |= dict.fromkeys(("filled", "new_filled"), "*i64")
    yield Kernel(
        name="video_bonus.push",
        target="apv_fast.kernels.video_bonus:push_kernel",
        signature=push | dict.fromkeys(("rows", "size", "windows", "steps", "queue_0"), "i32"),
        constants={"queue_1": 1, "D": 128, "WINDOW": 5, "ACC": "fp32", "BR": 8, "BD": 128},
        aligned=frozenset({"projected", "queue", "pushed", "size", "queue_0"}),
        options={"num_warps": 4},
    )


def _image_loss() -> Iterator[Kernel]:
    """2500 images of 64 x 64 x 3 without gaps, means in float32 and bfloat16; and means with channels first."""
    target = "apv_fast.kernels.image_loss"
    sizes = {"H": 64, "W": 64, "C": 3, "IMAGE_FLAT": True, "ACC": "fp32", "BLOCK": 2048}
    image, count = {"image": "*u8"}, {"count": "i32"}
    for dtype, flat in (("fp32", True), ("bf16", True), ("bf16", False)):
        name = f"{dtype}{'' if flat else '.channels_first'}"
        mean = {"mean": f"*{dtype}"}
        forward = mean | image | {"partial": "*fp32"} | count
        backward = {"grad": "*fp32"} | mean | image | {"grad_mean": f"*{dtype}"} | count | {"images": "i32"}
        strides = {tensor: {f"{tensor}_{axis}": "i32" for axis in "nhwc"} for tensor in ("mean", "image", "grad")}
        both = strides["mean"] | strides["image"]
        loss = {"MEAN_FLAT": flat}
        yield Kernel(
            name=f"image_loss.forward.{name}",
            target=f"{target}:forward_kernel",
            signature=forward | both,
            constants=sizes | loss | {"STEPS": 8},
            aligned=frozenset(forward),
        )
        yield Kernel(
            name=f"image_loss.backward.{name}",
            target=f"{target}:backward_kernel",
            signature=backward | both | strides["grad"],
            constants=sizes | loss | {"GRAD_FLAT": flat},
            aligned=frozenset(backward) - {"images"},
        )
        if flat:
            normalize = image | {"out": f"*{dtype}"} | count
            yield Kernel(
                name=f"normalize_image.{dtype}",
                target=f"{target}:normalize_kernel",
                signature=normalize | strides["image"],
                constants=sizes,
                aligned=frozenset(normalize),
            )
    yield Kernel(
        name="image_loss.finish",
        target=f"{target}:finish_kernel",
        signature={"partial": "*fp32", "loss": "*fp32", "programs": "i32", "images": "i32"},
        constants={"CONSTANT": 11291.7, "ACC": "fp32", "BLOCK": 1024},
        aligned=frozenset({"partial", "loss"}),
    )


def _adam() -> Iterator[Kernel]:
    """The step of 40 M float32 weights; neither kernel knows how many there are."""
    target, kind = "apv_fast.kernels.keras_adam", collections.namedtuple("Gradients", [f"of{i}" for i in range(64)])
    pointers: dict[str, Any] = {
        "plan": "*i64",
        "gradients": "*i64",
        "nothing": "*fp32",
        "partial": "*fp32",
        "iteration": "*i64",
    }
    step: dict[str, Any] = {"weights": "*i64", "m": "*fp32", "v": "*fp32", "lr": "*fp64", "norm_out": "*fp32"}
    sizes = {"DTYPE": "fp32", "CHUNK": 4096}
    settings = {"EPS": 1e-5, "CLIP": 100.0, "DECAY": 1e-6, "BETA1": 0.9, "BETA2": 0.999, "PARTIALS": 1024}
    yield Kernel(
        name="adam.addresses",
        target=f"{target}:addresses_kernel",
        signature={"table": "*i64", "tensors": kind(*["*fp32"] * 64)},
        constants={"COUNT": 64},
        aligned=frozenset({"table"}),
        options={"num_warps": 1},
    )
    yield Kernel(
        name="adam.norm",
        target=f"{target}:norm_kernel",
        signature=pointers | {"chunks": "i32"},
        constants=sizes,
        aligned=frozenset(pointers),
        options={"num_warps": 16},
    )
    for name, copies in (("adam.step", {}), ("adam.step with copies", {"copies": "*i64"})):
        yield Kernel(
            name=name,
            target=f"{target}:step_kernel",
            signature=pointers | step | copies | {"programs": "i32"},
            constants=sizes
            | settings
            | {"LOG1": math.log(0.9), "LOG2": math.log(0.999), "COPY": "bf16"}
            | ({} if copies else {"copies": None}),
            aligned=frozenset(pointers | step | copies),
            options={"num_warps": 16},
        )


@functools.cache
def table(arch: int) -> tuple[Kernel, ...]:
    """Every kernel of the package, forward and backward, in the sizes and tiles it is used at on ``arch``'s chip.

    The names are the same for every architecture.
    """
    chip = CHIPS[arch]
    return (
        *_lambda_return(),
        *_kl_balance(),
        *_image_loss(),
        *_adam(),
        *_knn_bonus(),
        *_rssm(chip),
        *(Kernel(**row) for row in imagination(chip.programs)),
    )
