"""Rows of :func:`apv_fast.kernels.aot.table`: imagination at full size. Does not import Triton.

D = H = 1024, S = C = 32, an actor of 400 units, 2500 rows: products of bfloat16, of float32 in full precision and of
tf32, with the tiles that a chip of so many multiprocessors is given; and one row, as when acting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .parts.tiling import choose_tile

ROWS = 2500
D = H = 1024
S = C = 32
ACTIONS, ACTION_PAD, UNITS = 4, 64, 400
KINDS = {"bf16": "half", "fp32": "ieee", "tf32": "tf32"}
ONLY_NARROW = ("actor_first", "actor", "gru_one_row")  # compiled for bfloat16 alone, to save CI's time
Row = dict[str, Any]


def _row(name: str, target: str, pointers: dict[str, str], sizes: Sequence[str], constants: Row, options: Row) -> Row:
    """Fields of a row; all pointers and sizes are multiples of 16, except the number of rows and offsets of noise."""
    free = {"n", "noise_offset"}
    return {
        "name": f"imagination.{name}",
        "target": f"apv_fast.kernels.parts.{target}",
        "signature": pointers | {size: "i32" for size in sizes if size not in constants},
        "constants": constants,
        "aligned": frozenset([*pointers, *sizes]) - free - set(constants),
        "options": options,
    }


def _tiled(chip: int, dtype: str, columns: int, rows: int = ROWS, widest: int = 256) -> tuple[Row, Row]:
    """(constants, options) of a product with that many columns, on ``chip`` multiprocessors."""
    kind = KINDS.get(dtype, "double")
    tile = choose_tile(rows, columns, kind, chip, widest)._asdict()
    warps = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    common = {"ACC": "fp64" if dtype == "fp64" else "fp32", "GROUP": 8}
    return common | tile | {"PRECISION": "tf32" if dtype == "tf32" else "ieee"}, warps


def _dense(chip: int, dtype: str) -> Iterator[Row]:
    """The layers of a step, forward and back."""
    own = {"tf32": "fp32"}.get(dtype, dtype)
    sizes = ("n", "x_row", "w_n", "w_k", "other_row", "out_row")
    names = ("x", "w", "bias", "other", "out")
    forward, back = {"w_k": 1}, {"w_n": 1} if own == "bf16" else {"w_k": 1}
    act, gated = {"BIAS": True, "ELU": True, "KEEP": True}, {"GATED": True}
    layers: dict[str, tuple[int, int, Row, Row, int]] = {  # K, columns, epilogue, strides, rows
        "img_in": (S * C + ACTION_PAD, H, act, forward, ROWS),
        "gru": (H + D, 3 * D, {"BIAS": True}, forward, ROWS),
        "actor_first": (S * C + D, UNITS, act, forward, ROWS),
        "actor": (UNITS, UNITS, act, forward, ROWS),
        "hidden_backward": (S * C, H, gated, back, ROWS),
        "deter_backward": (H, D, {}, back, ROWS),
        "gru_one_row": (H + D, 3 * D, {"BIAS": True}, forward, 1),
    }
    for name, (k, columns, epilogue, strides, rows) in layers.items():
        if dtype != "bf16" and name in ONLY_NARROW:
            continue
        tile, options = _tiled(chip, dtype, columns, rows)
        off = dict.fromkeys(("BIAS", "ELU", "KEEP", "GATED"), False)
        constants = tile | strides | off | epilogue | {"K": k, "COLUMNS": columns}
        pointers = {each: f"*{own}" for each in names}
        if name == "deter_backward":
            pointers["out"] = "*fp32" if dtype != "fp64" else "*fp64"
        yield _row(f"{name}.{dtype}", "dense:dense_kernel", pointers, sizes, constants, options)


def _latents(chip: int, dtype: str) -> Iterator[Row]:
    """Logits with their samples from a seed, their gradient, and the GRU's backward product."""
    own = {"tf32": "fp32"}.get(dtype, dtype)
    tile, options = _tiled(chip, dtype, S * C, widest=128)
    variables = {"S": S, "C": C, "CP": C}
    back = {"w_n": 1} if own == "bf16" else {"w_k": 1}
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    yield _row(
        f"sample.{dtype}",
        "dense:dense_sample_kernel",
        {
            "x": f"*{own}",
            "w": f"*{own}",
            "bias": f"*{own}",
            "noise": "*i64",
            "logit": wide,
            "stoch": wide,
            "narrow": f"*{own}",
        },
        ("n", "noise_offset", "noise_row", "x_row", "w_n", "w_k", "logit_row", "stoch_row", "narrow_row"),
        tile | variables | {"w_k": 1, "K": H, "KIND": 2, "NARROW": True},
        options,
    )
    yield _row(
        f"softmax_backward.{dtype}",
        "dense:dense_softmax_kernel",
        {"x": f"*{own}", "w": f"*{own}", "grad_stoch": wide, "grad_logit": wide, "logit": wide, "out": f"*{own}"},
        ("n", "x_row", "w_n", "w_k", "grad_stoch_row", "grad_logit_row", "logit_row", "out_row"),
        tile | variables | back | {"K": H, "STOCH": True, "OWN": False},
        options,
    )
    tile, options = _tiled(chip, dtype, H + D, widest=128)
    yield _row(
        f"gru_backward.{dtype}",
        "dense:gru_backward_kernel",
        {"grad": f"*{own}", "w": f"*{own}", "x": f"*{own}", "grad_x": f"*{own}", "carry": wide},
        ("n", "grad_row", "w_n", "w_k", "x_row", "grad_x_row", "carry_row"),
        tile | back | {"K": 3 * D, "H": H, "D": D},
        options,
    )


def _gates(dtype: str) -> Iterator[Row]:
    """LayerNorm and gates of a row a program."""
    own, wide = f"*{dtype}", "*fp32"
    constants = {"D": D, "UPDATE_BIAS": -1.0, "ACC": "fp32", "BR": 1, "BD": D}
    forward = {"parts": own, "scale": own, "offset": own, "before": wide, "deter": wide, "narrow": own, "norm": wide}
    backward = {
        "grad": wide,
        "grad_deter": wide,
        "carry": wide,
        "parts": own,
        "norm": wide,
        "scale": own,
        "offset": own,
    }
    backward |= {"before": wide, "grad_parts": own, "grad_norm": wide}
    rows: tuple[str, ...] = ("parts_row", "before_row", "deter_row", "narrow_row", "norm_row")
    row = _row(
        f"gates.{dtype}",
        "gates:gates_kernel",
        forward,
        ("n", *rows),
        constants | {"EPS": 1e-3, "NARROW": True},
        {"num_warps": 4},
    )
    yield row | {"aligned": row["aligned"] - {"norm_row"}}
    rows = (
        "grad_row",
        "grad_deter_row",
        "carry_row",
        *rows[:1],
        "norm_row",
        "before_row",
        "grad_parts_row",
        "grad_norm_row",
    )
    row = _row(
        f"gates_backward.{dtype}",
        "gates:gates_backward_kernel",
        backward,
        ("n", *rows),
        constants | {"OWN": True, "WEIGHTS": False},
        {"num_warps": 4},
    )
    yield row | {"aligned": row["aligned"] - {"norm_row"}}


def _samples() -> Iterator[Row]:
    """Latents and actions sampled by themselves, and their gradients; bfloat16 copies for the next product."""
    wide, narrow = "*fp32", "*bf16"
    sample = ("n", "noise_offset", "noise_row", "stats_row", "stoch_row", "narrow_row")
    pointers = {"stats": wide, "noise": "*i64", "stoch": wide, "narrow": narrow}
    categorical = {"S": S, "C": C, "BG": 64, "CP": C, "ACC": "fp32"}
    gaussian = {"S": S, "ACC": "fp32", "BLOCK": 256}
    seed = {"KIND": 2, "NARROW": True}
    yield _row("sample_categorical", "latent:sample_categorical_kernel", pointers, sample, categorical | seed, {})
    yield _row(
        "sample_gaussian", "latent:sample_gaussian_kernel", pointers, sample, gaussian | seed | {"MIN_STD": 0.1}, {}
    )
    grads = {"grad_stoch": wide, "grad_stats": wide, "stats": wide}
    rows: tuple[str, ...] = ("grad_stoch_row", "grad_stats_row", "stats_row", "out_row")
    yield _row(
        "categorical_backward",
        "latent:categorical_backward_kernel",
        grads | {"out": narrow},
        ("n", *rows),
        categorical | {"OWN": True},
        {},
    )
    yield _row(
        "gaussian_backward",
        "latent:gaussian_backward_kernel",
        grads | {"noise": "*i64", "out": narrow},
        ("n", "noise_offset", "noise_row", *rows),
        gaussian | {"KIND": 2, "OWN": True},
        {},
    )
    head = {"A": ACTIONS, "MIN_STD": 0.1, "SEED": True, "BLOCK": 128}
    rows = ("n", "noise_offset", "noise_row", "head_row", "action_row", "narrow_row")
    row = _row(
        "truncated_normal",
        "truncated_normal:sample_kernel",
        {"head": wide, "noise": "*i64", "action": wide, "narrow": narrow},
        rows,
        head | {"CLIP": 1e-6, "NARROW": True},
        {"num_warps": 4},
    )
    yield row | {"aligned": row["aligned"] - set(rows)}  # a row is A numbers
    rows = ("n", "noise_offset", "noise_row", "grad_row", "head_row", "grad_head_row")
    row = _row(
        "truncated_normal_backward",
        "truncated_normal:backward_kernel",
        {"grad": wide, "head": wide, "noise": "*i64", "grad_head": narrow},
        rows,
        head,
        {"num_warps": 4},
    )
    yield row | {"aligned": row["aligned"] - set(rows)}


def imagination(multiprocessors: int) -> Iterator[Row]:
    """Fields of every row."""
    for dtype in KINDS:
        yield from _dense(multiprocessors, dtype)
        yield from _latents(multiprocessors, dtype)
    for dtype in ("bf16", "fp32"):
        yield from _gates(dtype)
    yield from _samples()
