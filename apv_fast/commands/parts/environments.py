"""The environments of a command, as configured."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium

from apv_fast import envs
from apv_fast.config import WorldConfig, user_settings
from apv_fast.envs.parallel import Envs, ParallelEnvs, SingleEnv


def make_env(env_id: str, world: WorldConfig, seed: int) -> gymnasium.Env[Any, Any]:
    """The environment as configured."""
    with user_settings():
        return envs.make(
            env_id,
            seed=seed,
            action_repeat=world.action_repeat,
            time_limit=world.time_limit,
            camera=None if world.camera is None else camera_id(world.camera),
            quality=world.quality,
        )


def make_envs(env_id: str, world: WorldConfig, seed: int, count: int = 1) -> Envs:
    """``count`` of the environment, side by side; one alone is played in this process."""
    if count == 1:
        return SingleEnv(make_env(env_id, world, seed))
    return ParallelEnvs(partial(make_env, env_id, world, seed), count)


def camera_id(name: str) -> str | int:
    """A camera as environments take it: its number, if it is named by that."""
    return int(name) if name.removeprefix("-").isdigit() else name
