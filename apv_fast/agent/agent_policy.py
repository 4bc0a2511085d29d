"""An agent as a policy: what plays episodes in N environments with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apv_fast.agent.acting import Acting, Memory
from apv_fast.agent.agent import Agent
from apv_fast.agent.cuda_graph import GraphedUpdate, Recorder
from apv_fast.agent.world_model import Batch
from apv_fast.config import Graph


class AgentPolicy:
    """An agent in N environments, with its memory of them; on a GPU each step can be one CUDA graph.

    Args:
        agent: who acts.
        explore: sample the actor, else take its mode.
        generator: of all random choices; None: torch's default.
        acting: weights to act with; None: the agent's own, as they are at each step.
        graph: record a step and replay it, see :class:`GraphedUpdate`. A generator's seed may change between steps.
        stream: of the GPU to run in, beside what its current one does; None: the current one.
        recorder: None takes CUDA graphs.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        explore: bool,
        generator: torch.Generator | None = None,
        acting: Acting | None = None,
        graph: Graph = "off",
        stream: torch.cuda.Stream | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.acting, self.explore, self.generator = acting or agent.acting, explore, generator
        self.memory: Memory | None = None  # its tensors stay, since a recorded step writes into them
        self.stream = stream
        self.run = GraphedUpdate(
            self._step, self._changed, agent.device, graph, recorder, what="acting step", generator=generator
        )

    def __call__(self, image: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The agent's actions; remembers the step."""
        with torch.cuda.stream(self.stream):
            if self.memory is None:
                self.memory = self.acting.initial(len(image))
            out = self.run({"image": torch.from_numpy(image), "is_first": torch.from_numpy(is_first)})
            result: np.ndarray = out["action"].float().cpu().numpy()
        return result

    def remember(self, memory: Memory | None) -> None:
        """Go on from a memory that was saved."""
        self.memory = memory
        self.run.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Begin as if there had been no step."""
        if self.memory is not None:
            for tensor in self.memory.tensors():
                tensor.zero_()

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """On the device, from images to actions."""
        assert self.memory is not None
        action, memory = self.acting(
            batch["image"], batch["is_first"], self.memory, explore=self.explore, generator=self.generator
        )
        for place, value in zip(self._changed(), memory.tensors(), strict=True):
            place.copy_(value)
        return {"action": action}

    def _changed(self) -> list[Tensor]:
        return [] if self.memory is None else list(self.memory.tensors())
