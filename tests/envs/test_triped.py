"""The Triped: the quadruped's own model, task and reward, with a leg less."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from apv_fast import envs
from apv_fast.envs import dmc

# Kind, its count's name, how many a leg has.
PARTS = (
    *(("body", "nbody", 4), ("joint", "njnt", 4), ("geom", "ngeom", 4), ("site", "nsite", 1)),
    *(("actuator", "nu", 3), ("tendon", "ntendon", 3), ("sensor", "nsensor", 2)),
)


@pytest.mark.parametrize("task", dmc.TRIPED)
def test_one_leg_is_gone_and_the_rest_is_the_quadrupeds(task: str) -> None:
    with (
        closing(envs.make(f"dmc:triped-{task}", seed=0, quality="fast")) as three,
        closing(envs.make(f"dmc:quadruped-{task}", seed=0, quality="fast")) as four,
    ):
        assert (three.action_space.shape, four.action_space.shape) == ((9,), (12,))
        models = [env.unwrapped._env.physics.model for env in (three, four)]  # type: ignore[attr-defined]
        for kind, count, by_leg in PARTS:
            three_names, four_names = (
                {model.id2name(index, kind) for index in range(getattr(model, count))} for model in models
            )
            gone = four_names - three_names
            assert three_names < four_names
            assert len(gone) == by_leg, gone
            assert all("front_left" in name for name in gone)
        assert (models[0].neq, models[1].neq) == (3, 4)
        tasks = [env.unwrapped._env.task for env in (three, four)]  # type: ignore[attr-defined]
        assert tasks[0]._desired_speed == tasks[1]._desired_speed
        assert three.metadata["render_fps"] == four.metadata["render_fps"]


def test_it_moves_and_is_seeded() -> None:
    with closing(envs.make("dmc_triped_walk", seed=0, quality="fast", action_repeat=2)) as env:
        rolls = []
        for seed in (1, 2, 1):
            frames = [env.reset(seed=seed)[0]["image"]]
            generator = np.random.default_rng(0)
            for _ in range(5):
                observation, reward, terminated, truncated, _ = env.step(generator.uniform(-1, 1, 9))
                assert 0 <= float(reward) <= 2
                assert not (terminated or truncated)
                frames.append(observation["image"])
            rolls.append(np.stack(frames))
    np.testing.assert_array_equal(rolls[0], rolls[2])
    assert not np.array_equal(rolls[0], rolls[1])
    assert not np.array_equal(rolls[0][0], rolls[0][-1])


def test_an_episode_lasts_as_long_as_the_quadrupeds() -> None:
    with closing(envs.make("dmc:triped-run", seed=0, quality="fast", action_repeat=500)) as env:
        env.reset(seed=0)
        assert [env.step(np.zeros(9))[3] for _ in range(2)] == [False, True]
