"""A plan: steps, each one command line of ``apv-fast``, what it waits for, what it writes, and how far it is."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from apv_fast.atomic_file import atomic_file

State = Literal["waiting", "running", "done", "interrupted", "failed"]
FILE = "plan.json"
FORMAT = 1
OUT = "{out}"  # in the arguments of a step: the plan's folder, which may be moved


class PlanError(ValueError):
    """A plan cannot be used; the message names its file and says what to do."""


@dataclass(frozen=True)
class Curve:
    """Which learning curve a step draws: arms are compared on one task, seeds are averaged."""

    task: str
    """Id of the environment."""
    arm: str
    seed: int


@dataclass
class Step:
    """One command."""

    name: str
    """Unique in the plan: ``finetune/reach/apv/seed-1``."""
    arguments: tuple[str, ...]
    """Of ``apv-fast``: the command and its options; ``{out}`` stands for the plan's folder."""
    writes: str
    """Where the results go, relative to the plan's folder."""
    needs: tuple[str, ...] = ()
    """Names of the steps that must be done before."""
    curve: Curve | None = None
    """The learning curve among its results."""
    state: State = "waiting"
    job: str = ""
    """The launcher's name of what runs it, such as Slurm's number of the job."""


@dataclass
class Plan:
    """The steps of one experiment in the folder ``out``, in an order in which they can run."""

    experiment: str
    size: str
    out: Path
    metric: str
    """What is compared: a name in the runs' ``metrics.jsonl``."""
    steps: list[Step] = field(default_factory=list)

    def __getitem__(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def command(self, step: Step) -> list[str]:
        """The arguments of ``apv-fast`` that run a step."""
        return [one.replace(OUT, str(self.out)) for one in step.arguments]

    def command_line(self, step: Step) -> str:
        """What to type to run it by hand."""
        return shlex.join(["apv-fast", *self.command(step)])

    def runs(self) -> Iterator[tuple[Curve, Path]]:
        """Every learning curve and its run directory."""
        for step in self.steps:
            if step.curve:
                yield step.curve, self.out / step.writes

    def ready(self) -> list[Step]:
        """The steps that wait for nothing any more."""
        done = {step.name for step in self.steps if step.state == "done"}
        return [step for step in self.steps if step.state == "waiting" and done.issuperset(step.needs)]

    def save(self) -> None:
        """Write ``plan.json``."""
        content = {"format": FORMAT} | dataclasses.asdict(self) | {"out": str(self.out)}
        content["steps"] = [dataclasses.asdict(step) | {"command": self.command_line(step)} for step in self.steps]
        with atomic_file(self.out / FILE) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def go_on_from(self, before: Plan) -> None:
        """Take over states, and what is done but not selected this time, from the plan of an earlier call.

        Raises:
            PlanError: the folder is of another experiment, or a step was started with other options.
        """
        path = self.out / FILE
        if (before.experiment, before.size) != (self.experiment, self.size):
            raise PlanError(
                f"{path} is of {before.experiment} at size {before.size}, not of {self.experiment} at size "
                f"{self.size}; choose another --out"
            )
        old = {step.name: step for step in before.steps}
        for step in self.steps:
            was = old.pop(step.name, None)
            if was is None or was.state == "waiting":
                continue
            if was.arguments != step.arguments:
                raise PlanError(
                    f"{path}: {step.name} was started there as\n  {before.command_line(was)}\nand would now be\n"
                    f"  {self.command_line(step)}\nchoose another --out, or delete {self.out / was.writes} and {path}"
                )
            if was.state == "running":
                step.state, step.job = was.state, was.job
            elif was.state == "done" and was.needs == step.needs and (self.out / step.writes).exists():
                step.state = was.state
        self.steps[:0] = [step for step in old.values() if step.state == "done"]


def load_plan(out: Path) -> Plan | None:
    """The plan in the folder ``out``; None if there is none.

    Raises:
        PlanError: the file is damaged, or of another version.
    """
    path = out / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise PlanError(f"{path}: format is {content['format']!r}, not {FORMAT}; another version wrote it")
        steps = [_step(values) for values in content["steps"]]
        return Plan(content["experiment"], content["size"], out, content["metric"], steps)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path} is damaged ({error!r}); delete it: every run goes on from its checkpoint") from error


def _step(values: Mapping[str, Any]) -> Step:
    if values["state"] not in get_args(State):
        raise TypeError(f"state is {values['state']!r}")
    return Step(
        name=values["name"],
        arguments=tuple(values["arguments"]),
        writes=values["writes"],
        needs=tuple(values["needs"]),
        curve=Curve(**values["curve"]) if values["curve"] else None,
        state=values["state"],
        job=values["job"],
    )
