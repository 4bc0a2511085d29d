"""Acting: a step of filtering with both models, and the actor's choice."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.agent.policy import Policy
from apv_fast.backend import resolve, use_backend
from apv_fast.nn import RSSM, Actor
from apv_fast.types import State
from bench.cases.parts.rssm import DTYPES, FULL, NARROW
from bench.registry import FORWARD, WIDER, OnDevice, Problem, case


@case("policy", [{"B": 1, "E": 1536, "A": 4, **FULL}, {"B": 1, "E": 512, "A": 4, **NARROW}], dtypes=DTYPES, wider=WIDER)
@case("policy", [{"B": 16, "E": 1536, "A": 4, **FULL}], dtypes=DTYPES, device=OnDevice())
def policy(device: torch.device, dtype: torch.dtype, B: int, E: int, A: int, **sizes: int) -> Problem:
    """From embeddings to actions, as between two steps of an environment; states are fed back, as there."""
    lower = RSSM(E, 0, dtype=dtype, **sizes).to(device)  # type: ignore[arg-type]
    upper = RSSM(lower.feat_dim, A, dtype=dtype, **sizes).to(device)  # type: ignore[arg-type]
    actor = Actor(upper.feat_dim, A, dtype=dtype).to(device)
    embed, is_first = torch.randn(B, E, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    begin = [lower.initial(B), upper.initial(B)], torch.zeros(B, A, device=device)
    policies: dict[str, Policy] = {}
    memories: dict[str, tuple[list[State], Tensor]] = {}

    def run(name: str) -> object:
        if name not in policies:
            make = resolve("policy", actor.out.weight, name)
            policies[name] = make([lower, upper], actor, concat_embed=False)
        with use_backend(name):
            states, action = memories.get(name, begin)
            memories[name] = policies[name](embed, is_first, states, action, explore=True)
        return memories[name]

    return Problem({FORWARD: run})
