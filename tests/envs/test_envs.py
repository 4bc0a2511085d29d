"""Environments: Gymnasium's contract, seeds, repeats and limits, on the real simulator."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from apv_fast import envs
from apv_fast.envs import rendering
from apv_fast.envs.base import Rescale

Make = Callable[..., gymnasium.Env[Any, Any]]


@pytest.fixture
def make() -> Iterator[Make]:
    """``envs.make`` in the fast look; closes what it made."""
    environments = []

    def factory(id: str, **options: Any) -> gymnasium.Env[Any, Any]:
        settings: dict[str, Any] = {"seed": 0, "quality": "fast"} | options
        environments.append(envs.make(id, **settings))
        return environments[-1]

    yield factory
    for env in environments:
        env.close()


def roll_out(env: gymnasium.Env[Any, Any], steps: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    observation, _ = env.reset(seed=seed)
    frames, rewards = [observation["image"]], []
    generator = np.random.default_rng(0)
    for _ in range(steps):
        observation, reward, *_ = env.step(generator.uniform(-1, 1, env.action_space.shape))
        frames.append(observation["image"])
        rewards.append(reward)
    return np.stack(frames), np.array(rewards)


def test_gymnasium_contract(make: Make) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not having a spec.*")
        check_env(make("dmc:walker-walk", action_repeat=2))


@pytest.mark.parametrize("task", ["dmc:walker-walk", "dmc:quadruped-walk", "dmc:finger-turn_hard"])
def test_a_seed_fixes_frames_and_rewards_whatever_happened_before(make: Make, task: str) -> None:
    env = make(task)
    frames, rewards = roll_out(env, 8, seed=3)
    roll_out(env, 5, seed=4)
    for again in (roll_out(env, 8, seed=3), roll_out(make(task, seed=9), 8, seed=3)):
        np.testing.assert_array_equal(frames, again[0])
        np.testing.assert_array_equal(rewards, again[1])
    assert not np.array_equal(frames, roll_out(env, 8, seed=4)[0])


def test_the_seed_of_make_fixes_every_episode_and_the_sampled_actions(make: Make) -> None:
    first, second, other = (make("dmc:reacher-easy", seed=seed) for seed in (1, 1, 2))
    for episode in range(2):
        frames = [roll_out(env, 2, seed=None)[0] for env in (first, second, other)]
        np.testing.assert_array_equal(frames[0], frames[1])
        assert not np.array_equal(frames[0], frames[2]), episode
    np.testing.assert_array_equal(first.action_space.sample(), second.action_space.sample())


def test_episodes_of_one_environment_differ(make: Make) -> None:
    env = make("dmc:reacher-easy")
    assert not np.array_equal(roll_out(env, 1, seed=None)[0], roll_out(env, 1, seed=None)[0])


def test_repeating_an_action_sums_the_rewards_and_skips_the_frames(make: Make) -> None:
    single, double = make("dmc:walker-walk"), make("dmc:walker-walk", action_repeat=2)
    single.reset(seed=5)
    double.reset(seed=5)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 6)):
        one, two = single.step(action), single.step(action)
        both = double.step(action)
        assert both[1] == float(one[1]) + float(two[1])
        np.testing.assert_array_equal(both[0]["image"], two[0]["image"])
        assert both[4]["repeats"] == 2


def test_time_limit_counts_control_steps_and_cuts_the_last_repeat(make: Make) -> None:
    env = make("dmc:cartpole-balance", action_repeat=2, time_limit=5)
    env.reset()
    ends = [env.step(np.zeros(1))[2:] for _ in range(3)]
    assert [end[:2] for end in ends] == [(False, False), (False, False), (False, True)]
    assert [end[2]["repeats"] for end in ends] == [2, 2, 1]
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        env.step(np.zeros(1))


def test_the_suites_own_limit_truncates(make: Make) -> None:
    env = make("dmc:cartpole-balance", action_repeat=100)
    env.reset()
    ends = [env.step(np.zeros(1))[2:4] for _ in range(10)]
    assert ends == [(False, False)] * 9 + [(False, True)]


def test_a_terminal_state_terminates(make: Make) -> None:
    env = make("dmc:lqr-lqr_2_1", action_repeat=100)  # ends with discount 0 once it is at rest; few tasks ever do
    env.reset(seed=0)
    inner = env.unwrapped._env  # type: ignore[attr-defined]
    inner.task.get_termination = lambda physics: 0.0
    _, _, terminated, truncated, info = env.step(np.zeros(env.action_space.shape))
    assert (terminated, truncated, info["repeats"]) == (True, False, 1)


def test_actions_are_rescaled_from_the_environments_bounds(make: Make) -> None:
    env = make("dmc:reacher-easy")
    env.reset()
    inner = env.unwrapped
    inner._rescale = Rescale(np.array([-2.0, 0.0]), np.array([2.0, 10.0]))  # type: ignore[attr-defined]
    seen = []
    step = inner._env.step  # type: ignore[attr-defined]

    def spy(action: np.ndarray) -> Any:
        seen.append(action)
        return step(action)

    inner._env.step = spy  # type: ignore[attr-defined]
    for action in ([-1, -1], [1, 1], [0, 0], [3, -3]):
        env.step(np.array(action, np.float32))
    np.testing.assert_array_equal(seen, [[-2, 0], [2, 10], [0, 5], [2, 0]])


def test_looks(make: Make) -> None:
    frames = {
        quality: make("dmc:walker-walk", quality=quality).reset(seed=1)[0]["image"].astype(float)
        for quality in ("paper", "fast")
    }
    assert frames["paper"].shape == (64, 64, 3)
    difference = np.abs(frames["paper"] - frames["fast"]).mean()
    assert 1 < difference < 20, "the same scene, without shadows"


def test_the_paper_look_is_the_simulators_own(make: Make) -> None:
    env = make("dmc:walker-walk", quality="paper")
    frame = env.reset(seed=1)[0]["image"]
    from dm_control import suite

    inner = suite.load("walker", "walk")
    with inner.physics.reset_context():
        inner.physics.set_state(env.unwrapped._env.physics.get_state())  # type: ignore[attr-defined]
    np.testing.assert_array_equal(frame, inner.physics.render(64, 64, camera_id=0))
    inner.physics.free()


def test_size_and_camera(make: Make) -> None:
    assert make("dmc:walker-walk", size=700).reset()[0]["image"].shape == (700, 700, 3)
    default, same, other = (
        make("dmc:quadruped-walk", camera=camera).reset(seed=0)[0]["image"] for camera in (None, 2, 0)
    )
    np.testing.assert_array_equal(default, same)
    assert not np.array_equal(default, other)


def test_both_spellings_name_the_same_task(make: Make) -> None:
    for official, ours in (("dmc_cup_catch", "dmc:ball_in_cup-catch"), ("dmc_walker_walk", "dmc:walker-walk")):
        np.testing.assert_array_equal(make(official).reset(seed=0)[0]["image"], make(ours).reset(seed=0)[0]["image"])


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("minecraft:dig", {}, "unknown suite 'minecraft'; the suites are: dmc, metaworld, gym, atari"),
        ("dmc:walker-wlk", {}, "did you mean walker-walk"),
        ("dmc_walker", {}, "the tasks are: acrobot-swingup"),
        ("dmc:walker-walk", {"camera": 7}, "camera must be"),
        ("dmc:walker-walk", {"camera": "nowhere"}, "camera must be"),
        ("dmc:walker-walk", {"size": 0}, "size must be at least 1"),
        ("dmc:walker-walk", {"action_repeat": 0}, "action_repeat must be at least 1"),
        ("dmc:walker-walk", {"time_limit": 0}, "time_limit must be at least 1"),
        ("dmc:walker-walk", {"quality": "best"}, "quality must be"),
        ("dmc:walker-walk", {"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments(make: Make, id: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.parametrize("action", [np.zeros(5), np.full(6, np.nan), np.full(6, np.inf)])
def test_bad_actions(make: Make, action: np.ndarray) -> None:
    env = make("dmc:walker-walk")
    env.reset()
    with pytest.raises(ValueError, match="action must be finite and have shape"):
        env.step(action)


def test_every_listed_task_has_an_id_that_parses() -> None:
    tasks = envs.list_tasks("dmc") + envs.list_tasks("metaworld")
    assert {"dmc:quadruped-run", "dmc:triped-run", "metaworld:drawer-open"} <= set(tasks) <= set(envs.list_tasks())
    assert [":".join(envs._parse(task)) for task in tasks] == tasks
    assert [":".join(envs._parse(task.replace(":", "_").replace("-", "_"))) for task in tasks] == tasks


def test_renderer_is_chosen_only_where_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert rendering.choose_renderer() == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering, "_egl_devices", lambda: 0)
    monkeypatch.setattr(rendering, "_loads", lambda library: "OSMesa" in library)
    assert rendering.choose_renderer() == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    with pytest.raises(ImportError, match=r"apt-get install .*libosmesa6"):
        rendering.choose_renderer()


def test_a_renderer_that_fails_says_what_to_install() -> None:
    code = "from apv_fast import envs; envs.make('dmc:walker-walk', seed=0)"
    environment = os.environ | {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "4711"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "cannot render with MUJOCO_GL=egl" in ran.stderr
    assert "apt-get install" in ran.stderr
