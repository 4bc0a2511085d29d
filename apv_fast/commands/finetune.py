"""``apv-fast finetune``: learn a task from images, from a pre-trained video model or from scratch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apv_fast.agent import Agent, Memory
from apv_fast.agent.episode import (
    AgentPolicy,
    RandomPolicy,
    Row,
    action_size,
    episode_scores,
    episode_seed,
    evaluate,
    first_row,
    next_row,
    summarize,
)
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.commands.common import MeanMetrics, begin, checkpoint_of, computing, make_env, to_device
from apv_fast.config import FinetuneConfig, PretrainConfig, from_dict
from apv_fast.data import Replay
from apv_fast.run import (
    Metrics,
    Progress,
    RunDirectory,
    load_latest,
    restore_rng,
    rng_state,
    save_checkpoint,
    stop_on_signal,
    write_gif,
)


def finetune(config: FinetuneConfig) -> RunDirectory:
    """Run until ``config.steps`` agent steps are taken or the user interrupts; either way a checkpoint is left."""
    with computing(config.seed, config.device, config.backend) as device:
        pretrained = None if config.pretrained is None or config.resume else load_pretrained(config, device)
        run = begin(config)
        trainer = Finetuner(config, run, device)
        resumed = load_latest(run.checkpoints, map_location=device) if config.resume else None
        if resumed is not None:
            trainer.restore(*resumed)
        elif pretrained is None and config.pretrained is not None:
            pretrained = load_pretrained(config, device)
        if resumed is None and pretrained is not None:
            trainer.agent.load_pretrained(*pretrained)
        with Metrics(run.path, resume_step=trainer.step if config.resume else None) as metrics:
            trainer.train(metrics)
        trainer.close()
    return run


def load_pretrained(config: FinetuneConfig, device: torch.device) -> tuple[dict[str, Any], Path]:
    """State of the video model that a run starts from, and its file."""
    assert config.pretrained is not None
    run = RunDirectory.open(config.pretrained)
    from_dict(PretrainConfig, run.config(), run.config_file)
    source, _, state = checkpoint_of(run, device)
    return state["trainer"], source


class Finetuner:
    """Environment, replay and agent of one run, and their clocks."""

    def __init__(self, config: FinetuneConfig, run: RunDirectory, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        self.env = make_env(config.env, config.world, config.seed)
        self.eval_env = make_env(config.env, config.world, config.seed)
        size, discrete = action_size(self.env.action_space)
        self.agent = Agent(config, size, discrete=discrete, device=device)
        self.replay = Replay(
            run.train_episodes,
            chunk_length=config.length,
            capacity_steps=config.capacity,
            prioritize_ends=config.prioritize_ends,
            seed=config.seed,
            online=True,
        )
        self.random = RandomPolicy(self.env.action_space, config.seed)
        self.policy = AgentPolicy(self.agent, explore=True)
        self.step = 0  # agent steps taken
        self.episode = 0  # index of the one in progress
        self.training = False  # prefill is over
        self.rows: list[Row] = []  # of the episode in progress
        self.means = MeanMetrics()

    def train(self, metrics: Metrics) -> None:
        """The loop: act, store, update, evaluate, save."""
        config = self.config
        with (
            stop_on_signal() as stop,
            Progress("finetune", config.steps, start=self.step, unit="step") as progress,
        ):
            while self.step < config.steps and not stop.requested:
                self._act(metrics)
                if self.training and self._every(config.train_every):
                    self._update()
                self._report(metrics)
                progress.update(self.step, self._status)
                if self._every(config.checkpoint_every) and self.step < config.steps:
                    self.save()
        self.save()

    _status = "random actions"

    def _every(self, interval: int) -> bool:
        """Whether a clock of ``interval`` steps, counted from the end of the prefill, strikes now."""
        return (self.step - self.config.prefill) % interval == 0

    def _act(self, metrics: Metrics) -> None:
        """One step of the environment."""
        if not self.rows:
            self._begin_episode()
        policy = self.policy if self.training else self.random
        row = self.rows[-1]
        self._store(next_row(self.env, policy(row["image"], row["is_first"])))
        self.step += 1
        if self.rows[-1]["is_last"]:
            self._end_episode(metrics)

    def _begin_episode(self) -> None:
        self._store(first_row(self.env, episode_seed(self.config.seed, "train", self.episode)))

    def _store(self, row: Row) -> None:
        self.rows.append(row)
        self.replay.add(row)

    def _end_episode(self, metrics: Metrics) -> None:
        scores = episode_scores(self.rows)
        metrics.scalars(self.step, {f"train_{name}": value for name, value in scores.items()} | self._env_step)
        self.rows, self.policy.memory = [], None
        self.episode += 1
        # The policy takes over between two episodes, so that none is half random.
        if not self.training and self.step >= self.config.prefill:
            self.training = True
            for _ in range(self.config.first_updates):
                self._update()

    def _update(self) -> None:
        self.means.add(self.agent.update(to_device(self.replay.sample(self.config.batch), self.device)))

    @property
    def _env_step(self) -> dict[str, float]:
        """What curves are drawn against: environment steps, action repeats counted."""
        return {"env_step": float(self.step * self.config.world.action_repeat)}

    def _report(self, metrics: Metrics) -> None:
        """Metrics, evaluation and videos when they are due; at the end all of them."""
        config, last = self.config, self.step >= self.config.steps
        if not self.training:
            return
        if self._every(config.log_every) or last:
            metrics.scalars(self.step, self.means.take() | self.replay_size | self._env_step)
        if self._every(config.eval_every) or last:
            self._evaluate(metrics)
        if (self._every(config.video_every) or last) and config.length > CONTEXT:
            batch = to_device(self.replay.sample(SEQUENCES), self.device)
            frames = open_loop_video(self.agent.model, batch)
            write_gif(self.run.videos / f"open_loop_{self.step:08d}.gif", frames, scale=2)
            metrics.video(self.step, "open_loop", frames)

    @property
    def replay_size(self) -> dict[str, float]:
        """How much experience there is."""
        stats = self.replay.stats
        return {"replay_steps": stats["steps"], "replay_episodes": stats["episodes"]}

    def _evaluate(self, metrics: Metrics) -> None:
        generator = torch.Generator(self.device).manual_seed(self.config.seed)  # leaves training's own alone
        policy = AgentPolicy(self.agent, explore=False, generator=generator)

        def show(index: int, rows: list[Row]) -> None:
            if index == 0:
                frames = np.stack([row["image"] for row in rows[:: max(1, len(rows) // 100)]])
                write_gif(self.run.videos / f"eval_{self.step:08d}.gif", frames, scale=3)

        scores = evaluate(self.eval_env, policy, self.config.eval_episodes, self.config.seed, show)
        summary = summarize(scores, "eval")
        metrics.scalars(self.step, summary | self._env_step)
        self._status = f"evaluation return {summary['eval_return']:.1f}"

    def save(self) -> None:
        """Write a checkpoint from which the run goes on as if nothing had happened."""
        memory = self.policy.memory
        state = {
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "rng": rng_state({"random_policy": self.random.generator}),
            "step": self.step,
            "episode": self.episode,
            "training": self.training,
            "memory": None if memory is None else vars(memory),
        }
        save_checkpoint(self.run.checkpoints, self.step, state)

    def restore(self, source: Path, step: int, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, in the middle of an episode if it was."""
        self.agent.restore(state["agent"], source)
        self.replay.load_state_dict(state["replay"])
        self.step, self.episode, self.training = step, state["episode"], state["training"]
        self.policy.memory = None if state["memory"] is None else Memory(**state["memory"])
        self.rows = self.replay.ongoing
        if self.rows:  # the same start and the same actions lead back to where the environment was
            row = first_row(self.env, episode_seed(self.config.seed, "train", self.episode))
            for stored in self.rows[1:]:
                row = next_row(self.env, stored["action"])
            if not np.array_equal(row["image"], self.rows[-1]["image"]):
                warnings.warn(
                    "the environment did not come back to where it was; was it another machine or MuJoCo version?",
                    stacklevel=2,
                )
        restore_rng(state["rng"], {"random_policy": self.random.generator})

    def close(self) -> None:
        """Let go of environments and files."""
        self.env.close()
        self.eval_env.close()
        self.replay.close()
