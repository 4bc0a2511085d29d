"""The grid barrier of the Triton kernels alone: rounds of nothing, and a stress test with wrong orders to plant.

A round of the stress test: every program writes the round's number into its row, waits, and reads another program's
row, backwards, so that other warps had written it. Two rows take turns, so that one barrier a round is enough. Programs
work for different times before they write, and every 16th round one of them, always another, is late by far.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from apv_fast.kernels.parts.grid import grid_barrier

BLOCK = 256
WARPS = 8
LATE = 8  # trips to L2 and back that the late program makes: some microseconds


@triton.jit
def latency_kernel(counter, rounds):
    """``rounds`` barriers; counter: int32 [1], zero."""
    programs = tl.num_programs(0)
    for i in range(rounds):
        grid_barrier(counter, (i + 1) * programs)


@triton.jit
def _delay(state):
    """A little work whose length differs from program to program and from round to round."""
    state = state * 747796405 + 1013904223
    for _ in range((state >> 16) & 63):
        state = state * 1664525 + 1013904223
    return state


@triton.jit
def stress_kernel(counter, rows, wrong, rounds, FAULT: tl.constexpr, BLOCK: tl.constexpr, LATE: tl.constexpr):
    """counter: int32 [1], zero; rows: int32 [2, programs, BLOCK]; wrong: int32 [1], += reads of a wrong round."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    state = program.to(tl.int32)
    passed = 0
    for i in range(rounds):
        turn = rows + (i % 2) * programs * BLOCK
        state = _delay(state)
        if (i % 16 == 5) & (program == (i // 16) % programs):
            for _ in range(LATE):  # one after the other: each needs what the one before found, and adds nothing
                state += tl.where(tl.atomic_add(wrong, tl.where(state == 0x7FFFFFFF, 1, 0)) < 0, 1, 0)
        number = tl.where(state == 0x7FFFFFFF, -1, i + 1)  # needs the delay's result, so that it is not left out
        if FAULT != 3:
            tl.store(turn + program * BLOCK + lane, tl.zeros([BLOCK], tl.int32) + number)
        if FAULT != 1 or i % 7 != 3:
            passed += 1
            grid_barrier(counter, passed * programs - (1 if FAULT == 2 else 0))
        if FAULT == 3:
            tl.store(turn + program * BLOCK + lane, tl.zeros([BLOCK], tl.int32) + number)
        other = (program + i) % programs
        seen = tl.load(turn + other * BLOCK + (BLOCK - 1 - lane), cache_modifier=".cg")
        tl.atomic_add(wrong, tl.sum((seen != i + 1).to(tl.int32)))
