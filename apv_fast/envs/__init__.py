"""Environments by name, through Gymnasium's API, with pixels as the observation.

An id is ``suite:task`` (``dmc:walker-walk``) or the spelling of the official configurations (``dmc_walker_walk``).
A suite is one module, imported when first used: add its name to ``SUITES`` and give the module two functions,
``tasks() -> list[str]`` and ``make(task, view) -> PixelEnv`` (see :mod:`apv_fast.envs.base`).

Every environment has ``observation_space = Dict(image=Box(uint8 [size, size, 3]))`` and an action space that is a Box
on [-1, 1] (continuous actions) or Discrete. ``terminated`` means that the episode reached a terminal state (no reward
can follow), ``truncated`` that time ran out.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from types import ModuleType
from typing import Any, Literal, get_args

import gymnasium

from apv_fast.envs.base import View

Quality = Literal["paper", "fast"]

SUITES: dict[str, str] = {  # name in an id -> module
    "dmc": "apv_fast.envs.dmc",
    "metaworld": "apv_fast.envs.metaworld",
    "gym": "apv_fast.envs.gym",
    "atari": "apv_fast.envs.atari",
}


def make(
    id: str,
    *,
    seed: int,
    size: int = 64,
    action_repeat: int = 1,
    time_limit: int | None = None,
    camera: str | int | None = None,
    quality: Quality = "paper",
) -> gymnasium.Env[dict[str, Any], Any]:
    """Make the environment ``id``.

    Args:
        id: ``suite:task``; :func:`list_tasks` names them all.
        seed: fixes the initial states, in every later episode too, and what ``action_space.sample`` draws.
        size: height and width of the image in pixels.
        action_repeat: times that each action is applied; the rewards are summed. An episode's end cuts it short.
        time_limit: control steps after which an episode is truncated, counted before action repeat: 500 means 250
            actions with ``action_repeat=2``. The suite's own limit holds as well. None: only the suite's own.
        camera: index or name of the camera; None: the one that the paper used.
        quality: ``"paper"`` renders as the simulator does by default; ``"fast"`` leaves out multisampling, shadows
            and reflections, which is an order of magnitude faster without a GPU and looks different.

    Raises:
        ValueError: an argument is out of range, or the suite or task is unknown; the message lists what exists.
        ImportError: the suite's simulator is not installed, or nothing here can render.
    """
    for name, value in (("size", size), ("action_repeat", action_repeat), ("time_limit", time_limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if quality not in get_args(Quality):
        raise ValueError(f"quality must be 'paper' or 'fast', not {quality!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), not {seed}")
    suite, task = _parse(id)
    view = View(size, action_repeat, time_limit, camera, quality, seed)
    env: gymnasium.Env[dict[str, Any], Any] = _module(suite).make(task, view)
    return env


def list_tasks(suite: str | None = None) -> list[str]:
    """Every id of one suite, or of all whose packages are installed.

    Raises:
        ValueError: there is no such suite.
        ImportError: the suite's package is not installed.
    """
    if suite is not None:
        return [f"{suite}:{task}" for task in _module(suite).tasks()]
    ids = []
    for name in SUITES:
        with contextlib.suppress(ImportError):
            ids += list_tasks(name)
    return ids


def _module(suite: str) -> ModuleType:
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; the suites are: {', '.join(SUITES)}")
    return importlib.import_module(SUITES[suite])


def _parse(id: str) -> tuple[str, str]:
    """Suite and task of an id in either spelling."""
    separator = ":" if ":" in id else "_"
    suite, _, name = id.partition(separator)
    if suite == "gym":
        return suite, name  # it finds more than it lists, and says itself what there is
    tasks = _module(suite).tasks()
    # Underscores join both the words of a name and its parts in the official spelling, so compare without separators.
    known = {task.replace("-", "_"): task for task in tasks}
    task = known.get(name.replace("-", "_"))
    if task is None:
        near = difflib.get_close_matches(name, tasks, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown task {name!r} in suite {suite!r}; {hint}the tasks are: {', '.join(tasks)}")
    return suite, task
