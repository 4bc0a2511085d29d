"""``apv-fast finetune``: learn a task from images, from a pre-trained video model or from scratch."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from apv_fast.agent import Agent, Memory
from apv_fast.agent.agent_policy import AgentPolicy
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.agent.overlap import Updates
from apv_fast.commands.parts.device import computing, replay_place, to_device
from apv_fast.commands.parts.environments import make_envs
from apv_fast.commands.parts.rendering_mismatch import warn_of_mismatch
from apv_fast.commands.parts.training_run import begin, checkpoint_of, going_on, stopped
from apv_fast.config import ConfigError, FinetuneConfig, PretrainConfig, check, from_dict, user_settings
from apv_fast.data import Replay
from apv_fast.envs.episode import RandomPolicy, choose, episode_scores, episode_seed, evaluate, summarize
from apv_fast.envs.parallel import Envs, Row, action_size
from apv_fast.profile import annotate, annotated
from apv_fast.run import (
    MeanMetrics,
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
        checkpoint = load_latest(RunDirectory(config.out).checkpoints) if config.resume else None
        envs = stack.enter_context(closing(make_envs(config.env, config.world, config.seed, config.envs)))
        agent = new_agent(config, envs.action_space, device)
        if checkpoint is None and config.pretrained is not None:
            source, state = pretrained_state(config.pretrained)
            warn_of_mismatch(config.pretrained, state.get("qualities", ()), config.world.quality)
            agent.load_pretrained(state["trainer"], source)
        run = begin(config, agent, f"finetune: {config.steps} agent steps in {config.env}")
        trainer = stack.enter_context(closing(Finetuner(config, run, envs, agent)))
        if checkpoint is None:
            trainer.save()  # before there are episodes: a resumed run knows which ones are its own
        else:
            trainer.restore(*checkpoint)
            going_on(trainer.step, config.steps)
        with Metrics(run.path, resume_step=trainer.step if config.resume else None) as metrics:
            trainer.train(metrics)
    if trainer.step < config.steps:
        raise stopped(run, "finetune", trainer.step, config.steps)
    return run


def new_agent(config: FinetuneConfig, action_space: gymnasium.Space[Any], device: torch.device) -> Agent:
    """An untrained agent for the environment's actions."""
    with user_settings():
        size, discrete = action_size(action_space)
        return Agent(config, size, discrete=discrete, device=device)


def pretrained_state(path: Path) -> tuple[Path, dict[str, Any]]:
    """File and content of the checkpoint that a run starts from.

    Raises:
        RunError: ``path`` is not a pre-training run, or has no checkpoint yet.
    """
    run = RunDirectory.open(path)
    values = run.config()
    if "env" in values:
        raise RunError(f"pretrained: {path} is a fine-tuning run; it must be one of apv-fast pretrain")
    from_dict(PretrainConfig, values, run.config_file)
    source, _, state = checkpoint_of(run, torch.device("cpu"))
    return source, state


@dataclass
class OngoingEpisode:
    """The episode under way in one environment."""

    number: int = -1
    seed: int = 0
    random: RandomPolicy | None = None  # acts in episodes that began during the prefill
    rows: list[Row] = field(default_factory=list)  # so far; none between two episodes


class Finetuner:
    """Environments, replay and agent of one run, and their clocks."""

    def __init__(self, config: FinetuneConfig, run: RunDirectory, envs: Envs, agent: Agent) -> None:
        self.config, self.run, self.device = config, run, agent.device
        self.envs, self.agent = envs, agent
        self.eval_envs = make_envs(config.env, config.world, config.seed, min(config.envs, config.eval_episodes))
        self.replay = Replay(
            run.train_episodes,
            chunk_length=config.length,
            capacity_steps=config.capacity,
            prioritize_ends=config.prioritize_ends,
            seed=config.seed,
            online=True,
            **replay_place(config, self.device),
        )
        self.updates = Updates(agent, overlap=config.overlap, seed=episode_seed(config.seed, "act", 0))
        self.policy = AgentPolicy(
            agent,
            explore=True,
            generator=self.updates.generator,
            acting=self.updates.acting,
            graph=config.graph,
            stream=self.updates.stream,
        )
        generator = torch.Generator(self.device)  # leaves training's own alone
        self.eval_policy = AgentPolicy(agent, explore=False, generator=generator, graph=config.graph)
        self.step = 0  # agent steps taken, in all environments together
        self.before = 0  # ... before the last one of the environments
        self.begun = 0  # episodes
        self.training = False  # prefill is over
        self.ongoing = [OngoingEpisode() for _ in range(envs.count)]
        self.means = MeanMetrics()

    def train(self, metrics: Metrics) -> None:
        """The loop: act, store, update, evaluate, save."""
        config = self.config
        with (
            stop_on_signal() as stop,
            Progress("finetune", config.steps, start=self.step, unit="step") as progress,
        ):
            while self.step < config.steps and not stop.requested:
                if not self.advance(metrics):
                    progress.update(self.step, f"update {self.updates.begun} of the first {config.first_updates}")
                    continue
                self._report(metrics)
                progress.update(self.step, self._status)
                if self._strikes(config.checkpoint_every) and self.step < config.steps:
                    self.save()
        self.save()

    def advance(self, metrics: Metrics) -> bool:
        """One of the first updates (False); or a step of every environment, and the updates that are due after it."""
        if self.training and self.updates.begun < self.config.first_updates:
            self._update()
            return False
        self._act(metrics)
        if self.training and self.updates.begun >= self.config.first_updates:
            for _ in range(self._strikes(self.config.train_every)):
                self._update()
        return True

    _status = "random actions"

    def _strikes(self, interval: int) -> int:
        """How often a clock of ``interval`` steps, counted from the end of the prefill, has struck in the last step."""
        start = self.config.prefill
        return (self.step - start) // interval - (self.before - start) // interval

    def _act(self, metrics: Metrics) -> None:
        """One step of every environment."""
        self._begin_episodes()
        actions = self._actions()
        with annotate("env_step"):
            following = self.envs.step(actions)
        for i, row in enumerate(following):
            self._store(i, row)
        self.before, self.step = self.step, self.step + self.envs.count
        for i, row in enumerate(following):
            if row["is_last"]:
                self._end_episode(i, metrics)

    def _actions(self) -> np.ndarray:
        """Of the policy ``[N, A]``, and random ones in episodes that began during the prefill."""
        random = [episode.random for episode in self.ongoing]
        if all(random):
            return np.stack([policy.draw() for policy in random if policy])
        actions = choose(self.policy, [episode.rows[-1] for episode in self.ongoing])
        return np.stack([policy.draw() if policy else actions[i] for i, policy in enumerate(random)])

    def _begin_episodes(self) -> None:
        waiting = [i for i, episode in enumerate(self.ongoing) if not episode.rows]
        if not waiting:
            return
        for i in waiting:
            self.ongoing[i] = self._new_episode(self.begun, random=not self.training)
            self.begun += 1
        first = self.envs.begin({i: self.ongoing[i].seed for i in waiting})
        for i in waiting:
            self._store(i, first[i])

    def _new_episode(self, number: int, *, random: bool) -> OngoingEpisode:
        seed = episode_seed(self.config.seed, "train", number)
        return OngoingEpisode(number, seed, RandomPolicy(self.envs.action_space, seed) if random else None)

    def _store(self, i: int, row: Row) -> None:
        self.ongoing[i].rows.append(row)
        self.replay.add(row, i)

    def _end_episode(self, i: int, metrics: Metrics) -> None:
        config, rows = self.config, self.ongoing[i].rows
        scores = episode_scores(rows)
        metrics.scalars(self.step, {f"train_{name}": value for name, value in scores.items()} | self._env_step)
        self.ongoing[i] = OngoingEpisode()
        # The policy takes over between two episodes, so that none is half random.
        if not self.training and self.step >= config.prefill:
            if not self.replay.stats["episodes"]:
                raise ConfigError(
                    f"length is {config.length}, but episodes have only {len(rows)} steps, the first one included"
                )
            self.training, self._status = True, ""

    def _update(self) -> None:
        """Do an update, or begin it; its batch is of what has been played by now."""
        with annotate("replay_sample"):
            drawn = self.replay.sample(self.config.batch)
        self.updates.begin(drawn, self.means.add)

    @property
    def _env_step(self) -> dict[str, float]:
        """What curves are drawn against: environment steps, action repeats counted."""
        return {"env_step": float(self.step * self.config.world.action_repeat)}

    def _report(self, metrics: Metrics) -> None:
        """Metrics, evaluation and videos when they are due; at the end all of them."""
        config, last = self.config, self.step >= self.config.steps
        if not self.training:
            return
        clocks = (config.log_every, config.eval_every, config.video_every)
        log, evaluation, video = (self._strikes(interval) > 0 or last for interval in clocks)
        if log or evaluation or video:
            self.updates.wait()
        if log:
            metrics.scalars(self.step, self.means.take() | self.replay_size | self._env_step)
        if evaluation:
            self._evaluate(metrics)
            plot_runs([self.run.path], self.run.plots / "eval_return.png")
        if video and config.length > CONTEXT:
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
        policy, generator = self.eval_policy, self.eval_policy.generator
        assert generator is not None
        generator.manual_seed(self.config.seed)
        policy.forget()

        def show(index: int, rows: list[Row]) -> None:
            if index == 0:
                frames = np.stack([row["image"] for row in rows[:: max(1, len(rows) // 100)]])
                write_gif(self.run.videos / f"eval_{self.step:08d}.gif", frames, scale=3)

        scores = evaluate(self.eval_envs, policy, self.config.eval_episodes, self.config.seed, show)
        summary = summarize(scores, "eval")
        metrics.scalars(self.step, summary | self._env_step)
        self._status = f"evaluation return {summary['eval_return']:.1f}"

    @annotated("checkpoint")
    def save(self) -> None:
        """Write a checkpoint from which the run goes on as if nothing had happened."""
        self.updates.wait()
        memory = self.policy.memory
        state = {
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "rng": rng_state(),
            "step": self.step,
            "episodes": [[episode.number, episode.random is not None] for episode in self.ongoing],
            "begun": self.begun,
            "training": self.training,
            "acting": self.updates.state_dict(),
            "memory": None if memory is None else vars(memory),
            "means": self.means.state_dict(),
        }
        save_checkpoint(self.run.checkpoints, self.step, state)

    def restore(self, source: Path, step: int, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, in the middle of episodes if it was."""
        self.agent.restore(state["agent"], source)
        self.updates.load_state_dict(state.get("acting"))
        self.replay.load_state_dict(state["replay"])
        self.step = self.before = step
        self.begun, self.training = state["begun"], state["training"]
        self.policy.remember(None if state["memory"] is None else Memory(**_moved(state["memory"], self.device)))
        self.means.load_state_dict(state["means"])
        self._status = "" if self.training else self._status
        for i, (number, random) in enumerate(state["episodes"]):
            if rows := self.replay.ongoing(i):
                self.ongoing[i] = self._new_episode(number, random=random)
                self.ongoing[i].rows = list(rows)  # its own list: a new row is put into both
        self._return_to_where_it_was()
        restore_rng(state["rng"])

    def _return_to_where_it_was(self) -> None:
        """The same starts and the same actions lead back there."""
        under_way = {i: episode for i, episode in enumerate(self.ongoing) if episode.rows}
        actions = {i: [row["action"] for row in episode.rows[1:]] for i, episode in under_way.items()}
        if not under_way:
            return
        recovered = self.envs.recover({i: episode.seed for i, episode in under_way.items()}, actions)
        for i, episode in under_way.items():
            for _ in actions[i]:
                if episode.random:
                    episode.random.draw()
            if not np.array_equal(recovered[i]["image"], episode.rows[-1]["image"]):
                warnings.warn(
                    "the environment did not come back to where it was; was it another machine or MuJoCo version?",
                    stacklevel=3,
                )

    def close(self) -> None:
        """Let go of the evaluation's environments, of files, and of the update that runs."""
        self.updates.close()
        self.eval_envs.close()
        self.replay.close()


def _moved(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: _moved(value, device) if isinstance(value, dict) else value.to(device) for key, value in state.items()}
