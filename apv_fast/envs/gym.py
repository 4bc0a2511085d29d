"""Any registered Gymnasium environment that renders: ``gym:CartPole-v1``, ``gym:ALE/Pong-v5``, ``gym:package:Name-v0``.

The picture is what ``render()`` returns, averaged down to the size asked for; observations are not used. Actions are a
flat Box, rescaled from its bounds, or Discrete. The environment's own time limit holds as well as the one asked for.

Limits: an environment looks as it looks: ``quality`` changes nothing, and only some have cameras (MuJoCo's). A seed
fixes an episode as far as the environment keeps Gymnasium's contract. A frame skip of Atari's own is turned off, so
that ``action_repeat`` alone decides.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium import error, spaces
from PIL import Image

from apv_fast.envs.base import Info, PixelEnv, Rescale, View
from apv_fast.envs.rendering import choose_renderer

_PACKAGES = {"ALE": ("ale_py", "pip install 'apv-fast[atari]'")}  # by namespace: what registers it
_ATARI = "ale_py.env:AtariEnv"


def tasks() -> list[str]:
    """Every id that is registered now; a package that registers more may have to be imported first."""
    return sorted(gymnasium.registry)


def make(task: str, view: View) -> PixelEnv:
    """See :func:`apv_fast.envs.make`.

    Raises:
        ValueError: there is no such id, or its actions or pictures cannot be used.
        ImportError: a package that it needs is missing; names the command that installs it.
    """
    return GymEnv(task, view)


class GymEnv(PixelEnv):
    """One environment of the registry. ``info["success"]`` is there if the environment reports it."""

    def __init__(self, task: str, view: View, **options: Any) -> None:
        self._size = view.size
        self._env = _make(task, view, options)
        try:
            actions = _actions(task, self._env.action_space)
            super().__init__(view, actions, self._env.metadata.get("render_fps") or 30)
            self._env.reset(seed=0)  # some place their camera where things are at the first picture
            _checked_frame(task, self._render(task))
        except BaseException:
            self.close()
            raise

    def _begin(self, seed: int | None) -> None:
        self._env.reset(seed=seed)

    def _advance(self, action: Any) -> tuple[float, bool, bool, Info]:
        _, reward, terminated, truncated, info = self._env.step(self._native(action))
        success = info.get("success", info.get("is_success"))
        return float(reward), bool(terminated), bool(truncated), {} if success is None else {"success": bool(success)}

    def _native(self, action: Any) -> Any:
        """The action as the environment takes it."""
        space = self._env.action_space
        if isinstance(space, spaces.Discrete):
            return action + space.start
        assert isinstance(space, spaces.Box)
        return Rescale(space.low, space.high)(action).astype(space.dtype)

    def _render(self, task: str) -> Any:
        try:
            return self._picture()
        except error.DependencyNotInstalled as missing:
            raise ImportError(f"gym:{task}: {missing}") from missing

    def _screen(self) -> np.ndarray:
        """The picture in its own size, uint8 ``[H, W, 3]``."""
        return np.asarray(self._picture())

    def _picture(self) -> Any:
        if viewer := self._mujoco_viewer():
            viewer.make_context_current()
        return self._env.render()

    def _mujoco_viewer(self) -> Any:
        """What renders a MuJoCo environment, from its first picture on; it shares the process with other renderers."""
        return getattr(getattr(self._env.unwrapped, "mujoco_renderer", None), "viewer", None)

    def _image(self) -> np.ndarray:
        screen = self._screen()
        if screen.shape[:2] == (self._size, self._size):
            return screen.copy()
        return np.array(Image.fromarray(screen).resize((self._size, self._size), Image.Resampling.BOX))

    def close(self) -> None:
        """Free what the environment holds; it cannot be used afterwards."""
        if viewer := self._mujoco_viewer():
            viewer.make_context_current()
            viewer.con.free()  # else it is freed some time, in the name of another environment's context
        self._env.close()


def _make(task: str, view: View, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    with contextlib.suppress(ImportError):
        choose_renderer()  # for MuJoCo's environments; the others need none
    spec = _spec(task)
    if spec.entry_point == _ATARI:
        options = {"frameskip": 1} | options
    if view.camera is not None:
        options = options | {"camera_id" if isinstance(view.camera, int) else "camera_name": view.camera}
    try:
        return gymnasium.make(spec, render_mode="rgb_array", disable_env_checker=True, **options)
    except error.DependencyNotInstalled as missing:
        raise ImportError(f"gym:{task}: {missing}") from missing
    except ModuleNotFoundError as missing:
        raise ImportError(f"gym:{task} needs {missing.name}, which is not installed: pip install it") from missing
    except TypeError as wrong:
        if "camera" in str(wrong) and view.camera is not None:
            raise ValueError(f"camera: gym:{task} has none to choose from; leave it out") from wrong
        if "render_mode" in str(wrong):
            raise ValueError(f"gym:{task} does not render: its constructor takes no render_mode") from wrong
        raise


def _spec(task: str) -> Any:
    """The registered environment; packages that register it are imported."""
    package, _, name = task.rpartition(":")
    namespace = name.partition("/")[0]
    if "/" in name and namespace in _PACKAGES:
        module, command = _PACKAGES[namespace]
        _import(module, f"gym:{task} needs {module}: {command}")
    if package:
        _import(package, f"gym:{task}: there is no package {package!r} here; install it, or correct the name")
    try:
        spec = gymnasium.spec(name)
    except error.Error as unknown:  # neither this name nor this version
        near = difflib.get_close_matches(name, tasks(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "one of a package of its own is gym:PACKAGE:NAME"
        raise ValueError(f"unknown environment gym:{task}; {hint}") from unknown
    modes = _render_modes(spec.entry_point)
    if modes is not None and "rgb_array" not in modes:
        raise ValueError(f"gym:{task} cannot be seen: its render modes are {modes}; it must have 'rgb_array'")
    return spec


def _import(module: str, message: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ImportError(f"{message} ({missing})") from missing


def _render_modes(entry_point: Any) -> list[str] | None:
    """The modes that an environment's class declares; None where that cannot be told without making it."""
    if isinstance(entry_point, str):
        try:
            entry_point = gymnasium.envs.registration.load_env_creator(entry_point)
        except (ImportError, AttributeError, error.DependencyNotInstalled):
            return None  # making it will tell
    metadata = getattr(entry_point, "metadata", None)
    return list(metadata.get("render_modes", [])) if isinstance(metadata, dict) else None


def _actions(task: str, space: spaces.Space[Any]) -> spaces.Box | spaces.Discrete:
    """What the agent's action space is: one-hot actions, or a flat Box on [-1, 1]."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
        return spaces.Box(-1.0, 1.0, space.shape, np.float32)
    raise ValueError(f"the actions of gym:{task} are {space}; they must be Discrete or a flat Box of floats")


def _checked_frame(task: str, frame: Any) -> None:
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        what = "nothing" if frame is None else f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"gym:{task} renders {what}; it must render uint8 [height, width, 3]")
