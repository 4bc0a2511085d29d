"""Meta-world: upright, seeded, and solved by its scripted policies."""

from __future__ import annotations

import ctypes
import gc
import re
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from apv_fast import envs
from apv_fast.envs import metaworld

SOME = ("drawer-open", "reach", "lever-pull")


def make(task: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"seed": 0, "quality": "fast"} | options
    return closing(envs.make(f"metaworld:{task}", **settings))


def roll_out(env: gymnasium.Env[Any, Any], steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    observation, _ = env.reset(seed=seed)
    frames, rewards = [observation["image"]], []
    generator = np.random.default_rng(0)
    for _ in range(steps):
        observation, reward, terminated, _, info = env.step(generator.uniform(-1, 1, 4))
        assert not terminated
        assert isinstance(info["success"], bool)
        frames.append(observation["image"])
        rewards.append(reward)
    return np.stack(frames), np.array(rewards)


def check_seeds(task: str) -> bool:
    """A seed fixes frames and rewards whatever happened before; returns whether another seed shows."""
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    with make(task) as first, make(task, seed=9) as second:
        frames, rewards = roll_out(first, 4, seed=3)
        other, _ = roll_out(second, 20, seed=4)
        for env in (second, second, first):
            again = roll_out(env, 4, seed=3)
            np.testing.assert_array_equal(frames, again[0])
            np.testing.assert_array_equal(rewards, again[1])
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    return not np.array_equal(frames, other[:5])


def test_gymnasium_contract() -> None:
    with warnings.catch_warnings(), make("reach") as env:
        warnings.filterwarnings("ignore", ".*not having a spec.*")
        check_env(env, skip_close_check=True)


@pytest.mark.parametrize("task", [*SOME, "push"])  # push draws the goal's ball where a reset left it
def test_a_seed_fixes_everything(task: str) -> None:
    assert check_seeds(task)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(50))
def test_every_task(index: int) -> None:
    task = metaworld.tasks()[index]
    shown = check_seeds(task)
    assert shown or task == "plate-slide-side", "its goal is not drawn in Meta-world 3.1.1"


def test_the_seed_of_make_fixes_every_episode() -> None:
    with make("reach", seed=1) as first, make("reach", seed=1) as second:
        pairs = [(first.reset()[0]["image"], second.reset()[0]["image"]) for _ in range(2)]
    for one, two in pairs:
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(pairs[0][0], pairs[1][0]), "every episode has its own goal"


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_images_are_upright(camera: str) -> None:
    """Points one above the other in the world are so in the image: its rows, from a camera at either side."""
    with make("reach", camera=camera, size=100) as env:
        env.reset(seed=0)
        inner = env.unwrapped._env
        model, data = inner.model, inner.data
        rows = []
        site = model.site("goal").id
        for height in (0.05, 0.35):
            model.site_rgba[site], model.site_size[site] = (0, 0, 1, 1), 0.03  # nothing else is blue
            data.site_xpos[site] = (0.0, 0.7, height)
            red, green, blue = (env.render()[..., channel].astype(int) for channel in range(3))
            pixels = np.argwhere((blue > 2 * red) & (blue > 2 * green) & (blue > 80))
            assert len(pixels) >= 4
            rows.append(pixels[:, 0].mean())
    low, high = rows
    assert high < low - 5, "a higher point is nearer to the first row"


def test_the_picture_shows_the_table_below_and_the_arm_above() -> None:
    with make("drawer-open", quality="paper") as env:
        image = env.reset(seed=1)[0]["image"].astype(int)
    red = (image[..., 0] > 90) & (image[..., 1] < 60) & (image[..., 2] < 60)
    wood = (image[..., 0] > image[..., 2] + 20) & (image[..., 1] > 60) & ~red
    assert np.argwhere(red)[:, 0].mean() < 30 < 36 < np.argwhere(wood)[:, 0].mean()


def test_looks_and_cameras() -> None:
    images = []
    for options in ({}, {"camera": 1}, {"camera": "corner2"}, {"quality": "paper"}):
        with make("drawer-open", **options) as env:
            images.append(env.reset(seed=1)[0]["image"].astype(int))
    default, corner, corner2, paper = images
    np.testing.assert_array_equal(default, corner)
    assert not np.array_equal(default, corner2)
    assert 1 < np.abs(default - paper).mean() < 20, "the same scene, without shadows"


def test_the_clock() -> None:
    with make("reach", action_repeat=200) as env:
        env.reset(seed=0)
        ends = [env.step(np.zeros(4))[2:] for _ in range(3)]
        assert [end[:2] for end in ends] == [(False, False), (False, False), (False, True)]
        assert [end[2]["repeats"] for end in ends] == [200, 200, 100], "500 steps in all"
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            env.step(np.zeros(4))


def test_success_in_any_repeat_counts() -> None:
    with make("reach", action_repeat=3) as env:
        env.reset(seed=0)
        inner, seen = env.unwrapped._env, iter((False, True, False))
        step = inner.step
        inner.step = lambda action: (*step(action)[:4], {"success": next(seen)})
        assert env.step(np.zeros(4))[4] == {"success": True, "repeats": 3}


@pytest.mark.thorough
@pytest.mark.parametrize("task", SOME)
def test_scripted_policies_succeed(task: str) -> None:
    with make(task) as env:
        env.reset(seed=0)
        for _ in range(150):
            action = env.unwrapped.expert_action()
            assert env.action_space.contains(action)
            if env.step(action)[4]["success"]:
                return
    pytest.fail("no success in 150 steps")


def test_the_expert_needs_an_episode() -> None:
    with make("reach") as env, pytest.raises(RuntimeError, match=r"reset\(\)"):
        env.unwrapped.expert_action()


def test_names() -> None:
    assert len(metaworld.tasks()) == 50
    assert set(metaworld.PAPER_TASKS) <= set(metaworld.tasks())
    with closing(envs.make("metaworld_drawer_open", seed=0, quality="fast")) as official, make("drawer-open") as ours:
        np.testing.assert_array_equal(official.reset(seed=0)[0]["image"], ours.reset(seed=0)[0]["image"])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("drawer-opn", {}, "did you mean drawer-open"),
        ("drawer-open", {"camera": 9}, "camera must be below 7, or one of topview, corner"),
        ("drawer-open", {"camera": "nowhere"}, "camera must be below 7"),
    ],
)
def test_bad_arguments(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(task, **options)


def resident() -> float:
    """Memory of this process in MB, without what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


@pytest.mark.thorough
@pytest.mark.parametrize(("id", "left"), [("metaworld:reach", 32), ("dmc:triped-walk", 2)])
def test_closing_frees_contexts(id: str, left: int) -> None:
    """What is closed but still there has its model, of ``left`` MB, and not its OpenGL context, of 50 or more."""
    closed, used = [], []
    for _ in range(5):
        with closing(envs.make(id, seed=0, quality="fast")) as env:
            env.reset()
        closed.append(env)
        used.append(resident())
    assert used[-1] - used[1] < 3 * (left + 20), used
