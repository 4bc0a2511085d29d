"""Atari games (ale-py): ``atari:pong``, as DreamerV2 plays them (Hafner et al. 2021; Machado et al. 2018).

The smallest set of actions of each game, sticky with probability 0.25; up to 30 steps without action at the start; a
picture is the brighter one, pixel by pixel, of the last two, since many games flicker. The suite's own limit is 108 000
steps, half an hour. Use ``action_repeat=4``.

Limit: pictures are in colour; DreamerV2's are grey.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from apv_fast.envs.base import Info, PixelEnv, View
from apv_fast.envs.gym import GymEnv
from apv_fast.optional import optional

_PREFIX, _VERSION = "ALE/", "-v5"
_NOOPS = 30


def _names() -> dict[str, str]:
    """Task → id in Gymnasium's registry."""
    roms = optional("ale_py.roms", "atari: environments need", "atari")
    registration = optional("ale_py.registration", "atari: environments need", "atari")
    without = {"combat", "joust", "maze_craze", "warlords"}  # for two players
    return {
        rom: f"{_PREFIX}{registration.rom_id_to_name(rom)}{_VERSION}"
        for rom in roms.get_all_rom_ids()
        if rom not in without
    }


def tasks() -> list[str]:
    """Every game for one player: ``space_invaders``."""
    return sorted(_names())


def make(task: str, view: View) -> PixelEnv:
    """See :func:`apv_fast.envs.make`."""
    if view.camera is not None:
        raise ValueError(f"camera is {view.camera!r}; atari: has none to choose from, leave it out")
    return Atari(_names()[task], view)


class Atari(GymEnv):
    """One game."""

    _before: np.ndarray | None = None  # the screen before the last step

    def _begin(self, seed: int | None) -> None:
        super()._begin(seed)
        self._before = None
        for _ in range(int(self.np_random.integers(_NOOPS + 1))):
            if any(super()._advance(0)[1:3]):
                self._env.reset()

    def _advance(self, action: Any) -> tuple[float, bool, bool, Info]:
        self._before = super()._screen()
        return super()._advance(action)

    def _screen(self) -> np.ndarray:
        now = super()._screen()
        return now if self._before is None else np.maximum(now, self._before)
