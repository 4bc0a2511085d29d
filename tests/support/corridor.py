"""Small environments, which Gymnasium registers at the import: ``gym:tests.support.corridor:apv/Corridor-v0``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Corridor(gymnasium.Env[np.ndarray, Any]):
    """A red square walks left (0), stays (1) or walks right (2); at the right end there is a reward and an end."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    LENGTH = 8

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, self.LENGTH, (1,), np.float32)
        self.action_space: spaces.Space[Any] = spaces.Discrete(3, start=-1)
        self.place = 0
        self.actions: list[Any] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(self.LENGTH // 2))
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.place = max(self.place + int(np.sum(np.round(action))), 0)
        done = self.place >= self.LENGTH
        return self._observation(), float(done), done, False, {"is_success": done}

    def render(self) -> Any:
        picture = np.zeros((80, 10 * (self.LENGTH + 1), 3), np.uint8)
        picture[:, 10 * self.place : 10 * self.place + 10, 0] = 255
        return picture

    def _observation(self) -> np.ndarray:
        return np.array([self.place], np.float32)


class Continuous(Corridor):
    """The same with a velocity from -2 to 4 and an action without bounds."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.action_space = spaces.Box(np.array([-2, -np.inf]), np.array([4, np.inf]), dtype=np.float64)


class Many(Corridor):
    """Two choices at once."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.action_space = spaces.MultiDiscrete([2, 3])


class Blind(Corridor):
    """Text only."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012


class Blank(Corridor):
    """Renders nothing."""

    def render(self) -> Any:
        return None


class Missing(Corridor):
    """Wants a package."""

    def __init__(self, render_mode: str | None = None) -> None:
        raise gymnasium.error.DependencyNotInstalled('left is missing, run `pip install "right"`')


for _kind in (Corridor, Continuous, Many, Blind, Blank, Missing):
    gymnasium.register(f"apv/{_kind.__name__}-v0", f"{__name__}:{_kind.__name__}", max_episode_steps=20)
