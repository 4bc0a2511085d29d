"""Which tile a product is cut into: a short list a dtype, reasoned and not tuned. Does not import Triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program of :mod:`apv_fast.kernels.parts.dense` computes, and how it is compiled."""

    BM: int  # rows
    BN: int  # columns
    BK: int  # of the summed dimension at a time
    num_warps: int
    num_stages: int


# The largest first. For bfloat16 and float16 one or two warpgroups of 64 rows, as Hopper's tensor cores want them, and
# up to 147 KB of operands in flight, which Ampere has too.
TILES = {
    "half": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    ),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    "ieee": (Tile(64, 64, 16, 4, 3),),  # plain FMAs
    "double": (Tile(32, 32, 16, 4, 2),),
}
# Acting: every weight is read once, by as many programs as there are.
FEW_ROWS = {
    "half": Tile(16, 64, 64, 4, 5),
    "tf32": Tile(16, 64, 32, 4, 4),
    "ieee": Tile(16, 64, 32, 4, 4),
    "double": Tile(16, 32, 16, 4, 2),
}
INTERPRETED = Tile(16, 64, 64, 4, 1)


def choose_tile(rows: int, columns: int, kind: str, multiprocessors: int, widest: int = 256) -> Tile:
    """The largest tile of which there are enough to occupy every multiprocessor, else the smallest.

    ``widest`` bounds the columns, for epilogues that need registers of their own.
    """
    if rows <= FEW_ROWS[kind].BM * 2:
        return FEW_ROWS[kind]
    for tile in TILES[kind]:
        tiles = -(-rows // tile.BM) * -(-columns // tile.BN)
        if tiles >= multiprocessors and widest >= tile.BN:
            return tile
    return TILES[kind][-1]
