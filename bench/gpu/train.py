"""The moonshot's rehearsal: Meta-world fine-tuning at the paper's sizes for minutes, and what its whole run would take.

:func:`measure` trains in a process of its own, which begins with the packages of ``wheels/`` on its path if that folder
is there (:mod:`bench.gpu.wheels`). Environments, rendering, replay, acting and updates are those of ``apv-fast
finetune --overlap``; nothing is left out but metrics for TensorBoard. Without a GPU the sizes are tiny.

The idle share is the share of time in which neither an update nor a step of acting was under way on the device, by
CUDA events (without a GPU by the clock). Pauses inside an update count as busy; rendering does not count. What is said
of the paper's run is an extrapolation: rates that were measured, times the paper's numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.checkout import ROOT, environment
from bench.gpu.wheels import FOLDER, unpack

Figures = dict[str, Any]
Report = Callable[[Figures], None]
REPORT_SECONDS = 2.0
EVALUATION_SHARE = 0.1  # of the time, for one round of evaluation
GRACE_SECONDS = 60.0  # for the process to start and to end
MODULES = ("gymnasium", "mujoco", "metaworld", "scipy", "OpenGL", "pydantic", "PIL", "rich")
SETTLED = 5  # updates after the first ones from which on rates are measured: all graphs are recorded by then


def measure(seconds: float, report: Report, *, wheels: Path = FOLDER) -> Figures:
    """Train for about ``seconds``.

    Args:
        seconds: for everything, the start of the environments included.
        report: gets what is known so far, every few seconds.
        wheels: folder of wheels, used if it exists.

    Returns:
        What was reported last.

    Raises:
        ImportError: packages are missing; names them and what to do.
        RuntimeError: the process failed; the last line of its error.
    """
    env = environment()
    if wheels.is_dir():
        check_python(wheels)
        site = unpack(wheels, ROOT / "build" / "wheels")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    figures: Figures = {}
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "bench.gpu.train", "--seconds", str(seconds)]
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", str(seconds + GRACE_SECONDS), *command],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        for line in process.stdout:
            figures = json.loads(line)
            if "missing" not in figures:
                report(figures)
        if process.wait():
            if missing := figures.get("missing"):
                raise ImportError(
                    f"train needs {', '.join(missing)}: make wheels/ with python -m bench.gpu.wheels and carry it here"
                )
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"train ended with status {process.returncode}: {' '.join(last)}")
    return figures


def check_python(wheels: Path) -> None:
    """See that compiled wheels are for this Python.

    Raises:
        ImportError: they are not.
    """
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wrong = [one.name for one in wheels.glob("*-cp3*.whl") if "abi3" not in one.name and f"-{tag}-" not in one.name]
    if wrong:
        raise ImportError(f"{wheels} is for another Python than {tag}: {wrong[0]}; make it anew with --python")


def missing() -> list[str]:
    """The packages that training needs and that cannot be found."""
    from importlib.util import find_spec

    return [name for name in MODULES if find_spec(name) is None]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of ``(begin, end)``."""
    total, end = 0.0, float("-inf")
    for one, other in sorted(intervals):
        total += max(0.0, other - max(one, end))
        end = max(end, other)
    return total


class Clock:
    """Begin and end of work, in seconds since :meth:`reset`; of what is launched on a GPU by its own events."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.reset()

    def reset(self) -> None:
        """Forget all; nothing may be under way."""
        self._marks: list[tuple[Any, Any]] = []
        self._intervals: list[tuple[float, float]] = []
        self._zero = self.mark()

    def mark(self) -> Any:
        """Now, or when the current stream comes to this point."""
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same, with its begin and end noted."""

        def timed(*arguments: Any) -> Any:
            begin = self.mark()
            result = run(*arguments)
            self._marks.append((begin, self.mark()))
            return result

        return timed

    def busy(self) -> float:
        """Seconds in which anything that has ended was under way."""
        marks, self._marks = self._marks, []
        for begin, end in marks:
            if not self._on_gpu:
                self._intervals.append((begin - self._zero, end - self._zero))
            elif end.query():
                self._intervals.append((self._zero.elapsed_time(begin) / 1e3, self._zero.elapsed_time(end) / 1e3))
            else:
                self._marks.append((begin, end))
        done = covered(self._intervals)
        if self._intervals:  # what lies behind the last end stays exact as one interval
            last = max(end for _, end in self._intervals)
            self._intervals = [(last - done, last)]
        return done


def extrapolate(figures: Mapping[str, Any], paper: Any) -> Figures:
    """What ``paper``'s whole run, a FinetuneConfig, would take at the rates found."""
    updates = paper.first_updates + (paper.steps - paper.prefill) // paper.train_every
    parts = {"training": (paper.steps - paper.prefill) / figures["env_steps_per_s"]}
    if rate := figures.get("prefill_steps_per_s"):
        parts["prefill"] = paper.prefill / rate
    if rate := figures.get("first_updates_per_s"):
        parts["first_updates"] = paper.first_updates / rate
    if rate := figures.get("evaluation_steps_per_s"):
        length = paper.world.time_limit // paper.world.action_repeat
        parts["evaluation"] = paper.steps // paper.eval_every * paper.eval_episodes * length / rate
    return {
        "note": f"extrapolated from {figures['seconds']:.0f} s of training, not run: {paper.steps} steps, {updates} "
        f"updates, without {'start and checkpoints' if 'evaluation' in parts else 'start, checkpoints and evaluation'}",
        "minutes": round(sum(parts.values()) / 60, 2),
        "minutes_of": {name: round(value / 60, 2) for name, value in parts.items()},
    }


def configuration(on_gpu: bool) -> Any:
    """The paper's Meta-world setup with environments on all cores but two; tiny without a GPU."""
    from dataclasses import replace

    from apv_fast.config import PRESETS, BehaviorConfig, ModelConfig, WorldConfig

    paper = replace(PRESETS["metaworld"].finetune, env="metaworld:drawer-open", overlap=True)
    if on_gpu:
        cores = len(os.sched_getaffinity(0))
        return replace(paper, envs=max(2, min(12, cores - 2)), model=ModelConfig(precision="bf16"))
    return replace(
        paper,
        envs=2,
        prefill=20,
        first_updates=2,
        batch=2,
        length=8,
        world=WorldConfig(time_limit=10, camera="corner", quality="fast"),
        model=ModelConfig(deter=8, hidden=8, stoch=3, discrete=4, cnn_depth=2),
        behavior=BehaviorConfig(horizon=3, units=8),
    )


def rehearse(config: Any, seconds: float, report: Report) -> Figures:
    """Train with ``config`` for ``seconds``; see :func:`measure`."""
    from contextlib import closing

    from apv_fast.commands.finetune import Finetuner, new_agent
    from apv_fast.commands.parts.device import computing
    from apv_fast.commands.parts.environments import make_envs
    from apv_fast.config import PRESETS, to_dict
    from apv_fast.envs.episode import evaluate
    from apv_fast.run import Metrics, RunDirectory

    begin = time.perf_counter()
    end = begin + seconds * (1 - EVALUATION_SHARE)
    figures: Figures = {"envs": config.envs, "overlap": config.overlap, "precision": config.model.precision}
    with (
        tempfile.TemporaryDirectory() as folder,
        computing(config.seed, config.device, config.backend) as device,
        closing(make_envs(config.env, config.world, config.seed, config.envs)) as envs,
    ):
        agent = new_agent(config, envs.action_space, device)
        run = RunDirectory.create(Path(folder) / "run", to_dict(config))
        clock = Clock(device.type == "cuda")
        with (
            closing(Finetuner(config, run, envs, agent)) as trainer,
            Metrics(run.path, tensorboard=False) as metrics,
        ):
            agent.update = clock.wrap(agent.update)  # type: ignore[method-assign]
            trainer.policy.run = clock.wrap(trainer.policy.run)  # type: ignore[assignment]
            figures |= {"device": device.type, "start_s": round(time.perf_counter() - begin, 2)}
            report(figures)
            phases = Phases(trainer, clock, device.type == "cuda", figures)
            told = time.perf_counter()
            while (now := time.perf_counter()) < end:
                trainer.advance(metrics)
                phases.look()
                if now - told >= REPORT_SECONDS:
                    told = now
                    report(phases.figures())
            trainer.updates.wait()
            figures = phases.figures()
            report(figures)
            if trainer.training:
                start = time.perf_counter()
                scores = evaluate(trainer.eval_envs, trainer.eval_policy, trainer.eval_envs.count, config.seed)
                steps = sum(score["length"] for score in scores)
                figures["evaluation_steps_per_s"] = round(steps / (time.perf_counter() - start), 2)
    if "env_steps_per_s" in figures:
        figures["extrapolation"] = extrapolate(figures, PRESETS["metaworld"].finetune)
    report(figures)
    return figures


class Phases:
    """Where a run stands, prefill, first updates or training, and how fast each of them was."""

    def __init__(self, trainer: Any, clock: Clock, on_gpu: bool, figures: Figures) -> None:
        self._trainer, self._clock, self._on_gpu, self._figures = trainer, clock, on_gpu, figures
        self._name, self._begin, self._step, self._updates = "prefill", time.perf_counter(), 0, 0

    def look(self) -> None:
        """Notice that a phase has ended."""
        trainer, first = self._trainer, self._trainer.config.first_updates
        begun = trainer.updates.begun
        if self._name == "prefill" and trainer.training:
            self._figures["prefill_steps_per_s"] = round(trainer.step / self._seconds(), 2)
            self._next("first updates")
        if self._name == "first updates" and begun >= first:
            self._figures["first_updates_per_s"] = round(first / self._seconds(), 3)
            self._next("settling")
        if self._name == "settling" and begun >= first + SETTLED:
            self._next("training")
            self._clock.reset()

    def _next(self, name: str) -> None:
        self._trainer.updates.wait()
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        self._name, self._begin = name, time.perf_counter()
        self._step, self._updates = self._trainer.step, self._trainer.updates.begun

    def _seconds(self) -> float:
        return time.perf_counter() - self._begin

    def figures(self) -> Figures:
        """All that is known by now."""
        self._figures["phase"] = self._name
        if self._name == "training" and self._trainer.step > self._step:
            from apv_fast.config import PRESETS

            taken = self._seconds()
            self._figures |= {
                "seconds": round(taken, 2),
                "env_steps_per_s": round((self._trainer.step - self._step) / taken, 2),
                "updates_per_s": round((self._trainer.updates.begun - self._updates) / taken, 3),
                "idle_share": round(max(0.0, 1 - self._clock.busy() / taken), 4),
            }
            self._figures["extrapolation"] = extrapolate(self._figures, PRESETS["metaworld"].finetune)
        return dict(self._figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process: reports go to its output, a line of JSON each; 1 if packages are missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for everything (default: 120)")
    options = parser.parse_args(arguments)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report

    def say(line: Mapping[str, Any]) -> None:
        output.write(json.dumps(line) + "\n")
        output.flush()

    if names := missing():
        say({"missing": names})
        return 1
    import torch

    rehearse(configuration(torch.cuda.is_available()), options.seconds, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
