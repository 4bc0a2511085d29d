"""``apv-fast finetune``: learn a task from images, from a pre-trained video model or from scratch."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import gymnasium
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
from apv_fast.commands.common import (
    MeanMetrics,
    begin,
    checkpoint_of,
    computing,
    going_on,
    make_env,
    replay_place,
    stopped,
    to_device,
    user_settings,
)
from apv_fast.config import ConfigError, FinetuneConfig, PretrainConfig, check, from_dict
from apv_fast.data import Replay
from apv_fast.profile import annotate, annotated
from apv_fast.run import (
    Metrics,
    Progress,
    RunDirectory,
    RunError,
    load_latest,
    restore_rng,
    rng_state,
    save_checkpoint,
    stop_on_signal,
    write_gif,
)
from apv_fast.run.plot import plot_runs


def finetune(config: FinetuneConfig) -> RunDirectory:
    """Run until ``config.steps`` agent steps are taken.

    Raises:
        KeyboardInterrupt: the user stopped it; what was done is saved.
    """
    check(config)
    with computing(config.seed, config.device, config.backend) as device, ExitStack() as stack:
        found = load_latest(RunDirectory(config.out).checkpoints) if config.resume else None
        env = stack.enter_context(closing(make_env(config.env, config.world, config.seed)))
        agent = new_agent(config, env, device)
        if found is None and config.pretrained is not None:
            agent.load_pretrained(*pretrained_state(config.pretrained))
        run = begin(config, agent, f"finetune: {config.steps} agent steps in {config.env}")
        trainer = stack.enter_context(closing(Finetuner(config, run, env, agent)))
        if found is None:
            trainer.save()  # before there are episodes: a resumed run knows which ones are its own
        else:
            trainer.restore(*found)
            going_on(trainer.step, config.steps)
        with Metrics(run.path, resume_step=trainer.step if config.resume else None) as metrics:
            trainer.train(metrics)
    if trainer.step < config.steps:
        raise stopped(run, "finetune", trainer.step, config.steps)
    return run


def new_agent(config: FinetuneConfig, env: gymnasium.Env[Any, Any], device: torch.device) -> Agent:
    """An untrained agent for the environment's actions."""
    with user_settings():
        size, discrete = action_size(env.action_space)
        return Agent(config, size, discrete=discrete, device=device)


def pretrained_state(path: Path) -> tuple[dict[str, Any], Path]:
    """State of the video model that a run starts from, and its file.

    Raises:
        RunError: ``path`` is not a pre-training run, or has no checkpoint yet.
    """
    run = RunDirectory.open(path)
    values = run.config()
    if "env" in values:
        raise RunError(f"pretrained: {path} is a fine-tuning run; it must be one of apv-fast pretrain")
    from_dict(PretrainConfig, values, run.config_file)
    source, _, state = checkpoint_of(run, torch.device("cpu"))
    return state["trainer"], source


class Finetuner:
    """Environment, replay and agent of one run, and their clocks."""

    def __init__(self, config: FinetuneConfig, run: RunDirectory, env: gymnasium.Env[Any, Any], agent: Agent) -> None:
        self.config, self.run, self.device = config, run, agent.device
        self.env, self.agent = env, agent
        self.eval_env = make_env(config.env, config.world, config.seed)
        self.replay = Replay(
            run.train_episodes,
            chunk_length=config.length,
            capacity_steps=config.capacity,
            prioritize_ends=config.prioritize_ends,
            seed=config.seed,
            online=True,
            **replay_place(config, self.device),
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
                if self.training and self.agent.updates < config.first_updates:
                    self._update()
                    progress.update(self.step, f"update {self.agent.updates} of the first {config.first_updates}")
                    continue
                self._act(metrics)
                if self.training and self.agent.updates >= config.first_updates and self._every(config.train_every):
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
        action = policy(row["image"], row["is_first"])
        with annotate("env_step"):
            following = next_row(self.env, action)
        self._store(following)
        self.step += 1
        if self.rows[-1]["is_last"]:
            self._end_episode(metrics)

    def _begin_episode(self) -> None:
        self._store(first_row(self.env, episode_seed(self.config.seed, "train", self.episode)))

    def _store(self, row: Row) -> None:
        self.rows.append(row)
        self.replay.add(row)

    def _end_episode(self, metrics: Metrics) -> None:
        config, rows = self.config, self.rows
        scores = episode_scores(rows)
        metrics.scalars(self.step, {f"train_{name}": value for name, value in scores.items()} | self._env_step)
        self.rows, self.policy.memory = [], None
        self.episode += 1
        # The policy takes over between two episodes, so that none is half random.
        if not self.training and self.step >= config.prefill:
            if not self.replay.stats["episodes"]:
                raise ConfigError(
                    f"length is {config.length}, but episodes have only {len(rows)} steps, the first one included"
                )
            self.training, self._status = True, ""

    def _update(self) -> None:
        with annotate("replay_sample"):
            drawn = self.replay.sample(self.config.batch)
        self.means.add(self.agent.update(drawn))

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
            plot_runs([self.run.path], self.run.plots / "eval_return.png")
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

    @annotated("evaluate")
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

    @annotated("checkpoint")
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
            "means": self.means.state_dict(),
        }
        save_checkpoint(self.run.checkpoints, self.step, state)

    def restore(self, source: Path, step: int, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, in the middle of an episode if it was."""
        self.agent.restore(state["agent"], source)
        self.replay.load_state_dict(state["replay"])
        self.step, self.episode, self.training = step, state["episode"], state["training"]
        self.policy.memory = None if state["memory"] is None else Memory(**_moved(state["memory"], self.device))
        self.means.load_state_dict(state["means"])
        self._status = "" if self.training else self._status
        self.rows = list(self.replay.ongoing)  # its own list: a new row is put into both
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
        """Let go of the evaluation's environment and of files."""
        self.eval_env.close()
        self.replay.close()


def _moved(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: _moved(value, device) if isinstance(value, dict) else value.to(device) for key, value in state.items()}
