"""What every suite's environments share: the clock, action repeat, seeds and checked actions."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Observation = dict[str, Any]  # {"image": uint8 [size, size, 3]}
Info = dict[str, Any]


@dataclass(frozen=True)
class View:
    """How an environment is run and seen: the arguments of :func:`apv_fast.envs.make`, which has checked them."""

    size: int
    action_repeat: int
    time_limit: int | None
    camera: str | int | None
    quality: str
    seed: int


class PixelEnv(gymnasium.Env[Observation, Any]):
    """One task seen through a camera.

    ``info["repeats"]`` is how often the last action was applied: control steps for the clock. A suite that reports
    ``"success"`` has it in every step's ``info``: whether any of the repeats succeeded.

    Args:
        view: how it is run and seen.
        action_space: a Box on [-1, 1], or Discrete.
        fps: control steps a second, for videos; action repeats are taken into account here.
    """

    render_mode = "rgb_array"

    def __init__(self, view: View, action_space: spaces.Box | spaces.Discrete, fps: float) -> None:
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": max(round(fps / view.action_repeat), 1)}
        self.action_space = action_space
        self.action_space.seed(view.seed)
        self.observation_space = spaces.Dict({"image": spaces.Box(0, 255, (view.size, view.size, 3), np.uint8)})
        self._action_repeat, self._time_limit = view.action_repeat, view.time_limit
        self._steps: int | None = None  # control steps in this episode; None until the first reset
        self._first_seed: int | None = view.seed

    @abc.abstractmethod
    def _begin(self, seed: int | None) -> None:
        """Start an episode: the one of ``seed``, or the next one."""

    @abc.abstractmethod
    def _advance(self, action: Any) -> tuple[float, bool, bool, Info]:
        """One control step: reward, terminated, truncated, info. Continuous actions are in [-1, 1]."""

    @abc.abstractmethod
    def _image(self) -> np.ndarray:
        """The current frame, uint8 ``[size, size, 3]``, the caller's own."""

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Observation, Info]:
        """Start an episode; with ``seed``, the one that this seed always gives, whatever happened before."""
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        super().reset(seed=seed)
        self._begin(None if seed is None else int(self.np_random.integers(2**32)))
        self._steps = 0
        return {"image": self._image()}, {"repeats": 0}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, Info]:
        """Apply ``action`` ``action_repeat`` times: ``[A]`` in [-1, 1] (values outside are clipped), or an int.

        Raises:
            RuntimeError: no episode is under way.
            ValueError: the action has the wrong shape, is not finite or is not one of the discrete ones.
        """
        if self._steps is None:
            raise RuntimeError("step: call reset() first: no episode is under way")
        action = self._checked(action)
        total, repeats, success = 0.0, 0, False
        terminated = truncated = False
        info: Info = {}
        while repeats < self._action_repeat and not (terminated or truncated):
            reward, terminated, truncated, info = self._advance(action)
            total += reward
            repeats += 1
            self._steps += 1
            success |= bool(info.get("success", False))
            out_of_time = self._time_limit is not None and self._steps >= self._time_limit
            truncated = not terminated and (truncated or out_of_time)
        if terminated or truncated:
            self._steps = None  # simulators would begin a new episode silently, or go on
        info = info | ({"success": success} if "success" in info else {}) | {"repeats": repeats}
        return {"image": self._image()}, total, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The current frame, uint8 ``[size, size, 3]``."""
        return self._image()

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras that :meth:`render_camera` takes; empty where there is one view only."""
        return []

    def render_camera(self, camera: str | int) -> np.ndarray:
        """The same moment through another camera, uint8 ``[size, size, 3]``.

        Raises:
            ValueError: there is no such camera; the message names those that exist.
        """
        raise ValueError(f"camera is {camera!r}, but there is none to choose from here: the view is always the same")

    def _checked(self, action: Any) -> Any:
        if isinstance(self.action_space, spaces.Discrete):
            if not self.action_space.contains(action):
                raise ValueError(f"action must be an integer in [0, {self.action_space.n}), not {action!r}")
            return int(action)
        action, shape = np.asarray(action, np.float64), self.action_space.shape
        if action.shape != shape or not np.isfinite(action).all():
            raise ValueError(f"action must be finite and have shape {shape}, not {action!r}")
        return np.clip(action, -1.0, 1.0)


class Rescale:
    """From [-1, 1] to bounds ``[A]``; an action without finite bounds stays as it is."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        bounded = np.isfinite(low) & np.isfinite(high)
        self.low, self.high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """``action [A]`` in [-1, 1], in the bounds."""
        scaled: np.ndarray = self.low + (action + 1.0) / 2.0 * (self.high - self.low)
        return scaled
