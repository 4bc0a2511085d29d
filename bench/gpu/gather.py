"""A Triton kernel that does nothing but read: every program reads the same buffer, again and again, past L1."""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 16384  # 64 KB at once: 16 loads of 16 bytes a thread are on their way before the first is used


@triton.jit
def read_kernel(source, sums, size, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """sums [programs, BLOCK]: what a program read, added up by position in the block; ``size`` % BLOCK == 0."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    blocks = size // BLOCK
    for i in range(ROUNDS * blocks):
        # Programs begin at different places, and the place depends on i: no load can be moved out of the loop.
        place = (i + program) % blocks
        total += tl.load(source + place * BLOCK + lane, cache_modifier=".cg")
    tl.store(sums + program * BLOCK + lane, total)
