"""Updates beside the environments: while update k runs, they are played on with the weights of update k − 1.

What is fixed, whatever takes how long: the batch of an update is drawn before the update begins, by whoever plays, so
from what has been played by then; the weights that act are copied after update k − 1 has ended and before update k
begins; the two draw their random numbers from generators of their own. So the same seed gives the same run.

On the CPU an update runs in a thread (its kernels let Python's lock go). On a GPU it is only launched; acting goes to
a stream of its own with a higher priority, so that it need not wait for the update.

Limits: whoever reads what an update changes calls :meth:`Updates.wait` before. An update cannot be stopped in its
middle: an interrupt waits for its end.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from apv_fast.agent.agent import Agent
from apv_fast.agent.world_model import Batch, Metrics


class Updates:
    """An agent's updates, and the weights that act meanwhile.

    Args:
        agent: who learns.
        overlap: :meth:`begin` does not wait for the update's end; else it does, and the newest weights act.
        seed: of what acting draws, with ``overlap``.
    """

    def __init__(self, agent: Agent, *, overlap: bool, seed: int) -> None:
        self.agent, self.overlap, self.begun = agent, overlap, agent.updates
        self.acting = agent.acting
        self.generator: torch.Generator | None = None  # of acting; None: torch's default, like the update
        self.stream: torch.cuda.Stream | None = None  # of acting; None: the update's
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        if overlap:
            self.acting = agent.acting.copy()
            self.generator = torch.Generator(agent.device).manual_seed(seed)
            if agent.device.type == "cuda":
                self.stream = torch.cuda.Stream(agent.device, priority=-1)
                self.stream.wait_stream(torch.cuda.current_stream(agent.device))
            else:
                self._thread = ThreadPoolExecutor(1, "update")

    def begin(self, batch: Batch, done: Callable[[Metrics], None]) -> None:
        """Begin update ``begun + 1`` after the one before has ended; the weights of that one act from now on.

        Args:
            batch: see :meth:`Agent.update`; must not change any more.
            done: gets the update's metrics, where the update runs.

        Raises:
            Exception: the update before failed; what it raised.
        """
        self.wait()
        if self.overlap:
            self._publish()
        self.begun += 1
        if self._thread is None:
            done(self.agent.update(batch))
        else:  # the backend in force is a context variable, which a thread has of its own
            context = contextvars.copy_context()
            self._running = self._thread.submit(context.run, lambda: done(self.agent.update(batch)))

    def wait(self) -> None:
        """Return when all updates that began have ended; on a GPU what is launched next comes after them anyway.

        Raises:
            Exception: what the update raised.
        """
        if self._running is not None:
            self._running.result()
            self._running = None

    def _publish(self) -> None:
        """The agent's weights as they are now act from the next step on."""
        if self.stream is None:
            self.acting.take(self.agent.acting)
            return
        current = torch.cuda.current_stream(self.agent.device)
        current.wait_stream(self.stream)  # the last step has read the old ones
        self.acting.take(self.agent.acting)
        self.stream.wait_stream(current)

    def reset(self) -> None:
        """The agent was given other weights from outside: it has ``agent.updates`` updates, and they act."""
        self.begun = self.agent.updates
        if self.overlap:
            self._publish()

    def state_dict(self) -> dict[str, Any] | None:
        """What the agent's own state lacks: the weights that act and what they draw from. None without overlap."""
        if self.generator is None:
            return None
        return {"weights": self.acting.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Put it back, after the agent's own."""
        self.reset()
        if state is not None and self.generator is not None:
            self.acting.load_state_dict(state["weights"])
            self.generator.set_state(state["generator"].cpu())
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream(self.agent.device))

    def close(self) -> None:
        """Wait for the update that runs, whatever comes of it, and let its thread go."""
        if self._thread is not None:
            self._thread.shutdown()
