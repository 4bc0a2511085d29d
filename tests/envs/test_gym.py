"""Gymnasium's registry and Atari: what works, what is refused, and discrete actions from video to policy."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from apv_fast import envs
from apv_fast.cli import main
from apv_fast.commands.parts.training_run import load_agent
from apv_fast.data import EPISODE_KEYS, read_episode
from tests.support.corridor import Continuous, Corridor

CORRIDOR = "gym:tests.support.corridor:apv/Corridor-v0"
needs_atari = pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed")


@pytest.fixture
def corridor() -> Iterator[Any]:
    with closing(envs.make(CORRIDOR, seed=0)) as env:
        yield env


def inner(env: Any) -> Any:
    return env.unwrapped._env.unwrapped


def test_pictures_are_averaged_down(corridor: Any) -> None:
    image = corridor.reset(seed=0)[0]["image"]
    assert image.shape == (64, 64, 3)
    assert corridor.observation_space.contains({"image": image})
    place = inner(corridor).place
    full = inner(corridor).render().mean((0, 1))
    np.testing.assert_allclose(image.mean((0, 1)), full, atol=0.5)
    assert abs(image[..., 0].mean(0).argmax() / 64 - (place + 0.5) / (Corridor.LENGTH + 1)) < 0.1
    assert image[..., 0].max() == 255 and not image[..., 1:].any()


def test_seeds_and_discrete_actions(corridor: Any) -> None:
    assert corridor.action_space == gymnasium.spaces.Discrete(3)
    starts = []
    for seed in (*range(8), *range(8)):
        corridor.reset(seed=seed)
        starts.append(inner(corridor).place)
        corridor.step(corridor.action_space.sample())
    assert starts[:8] == starts[8:]
    assert len(set(starts)) > 1
    inner(corridor).actions.clear()
    for action in (0, np.int64(1), 2):
        corridor.step(action)
    assert inner(corridor).actions == [-1, 0, 1], "its own actions begin at -1"
    for wrong in (3, -1, 0.5, np.zeros(3)):
        with pytest.raises(ValueError, match=r"action must be an integer in \[0, 3\)"):
            corridor.step(wrong)


def test_ends_and_rewards(corridor: Any) -> None:
    corridor.reset(seed=0)
    ends: list[Any] = []
    while not ends or not (ends[-1][2] or ends[-1][3]):
        ends.append(corridor.step(2))
    assert [end[1] for end in ends] == [0.0] * (len(ends) - 1) + [1.0]
    assert ends[-1][2:] == (True, False, {"success": True, "repeats": 1})
    corridor.reset(seed=0)
    assert [corridor.step(1)[2:4] for _ in range(20)] == [(False, False)] * 19 + [(False, True)], "its own limit"
    with closing(envs.make(CORRIDOR, seed=0, time_limit=7, action_repeat=5)) as short:
        short.reset()
        assert [short.step(1)[3:] for _ in range(2)] == [
            (False, {"success": False, "repeats": 5}),
            (True, {"success": False, "repeats": 2}),
        ]


def test_continuous_actions_are_rescaled_where_they_have_bounds() -> None:
    with closing(envs.make("gym:tests.support.corridor:apv/Continuous-v0", seed=0)) as env:
        env.reset(seed=0)
        for action in ([-1, -1], [1, 1], [0, 3]):
            env.step(np.array(action, np.float32))
        one: Continuous = inner(env)
        np.testing.assert_array_equal(one.actions, [[-2, -1], [4, 1], [1, 1]])
        assert one.actions[0].dtype == np.float64


def test_a_mujoco_environment_and_its_cameras() -> None:
    images = []
    for seed, camera in enumerate((None, "track", -1, None)):
        with closing(envs.make("gym:HalfCheetah-v5", seed=seed, camera=camera)) as env:
            images.append(env.reset(seed=3)[0]["image"])
            assert images[-1].std() > 10
            assert env.action_space.shape == (6,)
    assert not np.array_equal(images[1], images[2])
    np.testing.assert_array_equal(images[0], images[3])


def test_a_closed_environment_leaves_the_next_ones_pictures_alone() -> None:
    """The garbage collector takes it when it likes, and the buffers of the same numbers are another's then."""
    first = envs.make("gym:HalfCheetah-v5", seed=0)
    first.reset(seed=3)
    garbage = [inner(first).mujoco_renderer.viewer.con]
    first.close()
    with closing(envs.make("gym:HalfCheetah-v5", seed=1)) as env:
        before = env.reset(seed=3)[0]["image"]
        garbage.clear()
        del first
        gc.collect()
        np.testing.assert_array_equal(env.reset(seed=3)[0]["image"], before)


@pytest.mark.parametrize(
    ("id", "options", "kind", "message"),
    [
        ("gym:CartPol-v1", {}, ValueError, "unknown environment gym:CartPol-v1; did you mean CartPole-v1"),
        ("gym:CartPole-v99", {}, ValueError, "did you mean CartPole-v1"),
        ("gym:xyzzy", {}, ValueError, "one of a package of its own is gym:PACKAGE:NAME"),
        ("gym:no_such_package:A-v0", {}, ImportError, "no package 'no_such_package' here"),
        ("gym:tests.support.corridor:apv/Missing-v0", {}, ImportError, 'pip install "right"'),
        ("gym:tests.support.corridor:apv/Many-v0", {}, ValueError, r"MultiDiscrete.*must be Discrete or a flat Box"),
        ("gym:tests.support.corridor:apv/Blind-v0", {}, ValueError, r"its render modes are \['ansi'\]"),
        ("gym:tests.support.corridor:apv/Blank-v0", {}, ValueError, "renders nothing; it must render uint8"),
        (CORRIDOR, {"camera": "top"}, ValueError, "camera: gym:tests.support.corridor:apv/Corridor-v0 has none"),
    ],
)
def test_what_cannot_be_used(id: str, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        envs.make(id, seed=0, **options)


def test_without_ale_py(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ale_py", "ale_py.roms", "ale_py.registration"):
        monkeypatch.setitem(sys.modules, module, None)
    for id in ("gym:ALE/Pong-v5", "atari:pong"):
        with pytest.raises(ImportError, match=r"pip install 'apv-fast\[atari\]'"):
            envs.make(id, seed=0)
    assert "dmc:walker-walk" in envs.list_tasks(), "the other suites are still listed"


@needs_atari
def test_atari_is_seeded_and_repeats_actions_itself() -> None:
    rolls = []
    for id in ("atari:breakout", "atari_breakout", "gym:ALE/Breakout-v5"):
        with closing(envs.make(id, seed=0, action_repeat=4)) as env:
            for seed in (5, 6, 5):
                frames = [env.reset(seed=seed)[0]["image"]]
                ale = inner(env).ale
                before = ale.getEpisodeFrameNumber()
                for step in range(10):
                    frames.append(env.step((1, 3, 2)[step % 3])[0]["image"])
                assert ale.getEpisodeFrameNumber() - before == 40, "4 frames an action, not 16"
                rolls.append(np.stack(frames))
    np.testing.assert_array_equal(rolls[0], rolls[2])
    np.testing.assert_array_equal(rolls[0], rolls[3])
    np.testing.assert_array_equal(rolls[6], rolls[8])
    assert not np.array_equal(rolls[0], rolls[1])
    assert not np.array_equal(rolls[0], rolls[6]), "atari: begins with some steps without action"


@needs_atari
def test_atari_shows_the_brighter_of_two_screens() -> None:
    with closing(envs.make("atari:pong", seed=0, action_repeat=2, size=210)) as env:
        env.reset(seed=1)
        screens = []
        game = inner(env)
        render = game.render

        def spy() -> np.ndarray:
            screens.append(render())
            return screens[-1]

        game.render = spy
        env.unwrapped._size = 160  # type: ignore[attr-defined]
        env.step(2)
        assert len(screens) == 3
        np.testing.assert_array_equal(env.unwrapped._screen(), np.maximum(screens[1], screens[2]))  # type: ignore[attr-defined]


@needs_atari
def test_atari_names() -> None:
    tasks = envs.list_tasks("atari")
    assert len(tasks) > 90
    assert {"atari:pong", "atari:space_invaders"} <= set(tasks)
    assert [":".join(envs._parse(task)) for task in tasks] == tasks
    with pytest.raises(ValueError, match="camera is 'x'; atari: has none"):
        envs.make("atari:pong", seed=0, camera="x")


# From videos to a policy with discrete actions

MODEL = "--model.deter 8 --model.hidden 8 --model.stoch 3 --model.discrete 4 --model.cnn-depth 2"
SMALL = f"{MODEL} --batch 2 --length 6 --device cpu"


def apv(command: str) -> None:
    assert main(command.split()) == 0, command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos in data/, a pre-training run in pre/, a fine-tuning run in fine/."""
    folder = tmp_path_factory.mktemp("discrete")
    apv(f"collect --env {CORRIDOR} --episodes 3 --out {folder}/data --world.action-repeat 1")
    apv(f"pretrain --data {folder}/data --out {folder}/pre --steps 2 {SMALL}")
    apv(
        f"finetune --env {CORRIDOR} --out {folder}/fine --pretrained {folder}/pre --steps 60 --prefill 20 "
        f"--first-updates 2 {SMALL} --world.action-repeat 1 --behavior.units 8 --behavior.horizon 3 --discount-head "
        "--eval-episodes 2"
    )
    return folder


def one_hot(actions: np.ndarray) -> bool:
    return bool((np.sort(actions, -1) == [0, 0, 1]).all())


def test_episodes_hold_one_hot_actions(runs: Path) -> None:
    for folder in ("data", "fine"):
        files = sorted((runs / folder / "train_episodes").iterdir())
        assert len(files) >= 3
        for path in files:
            episode = read_episode(path, EPISODE_KEYS, image_shape=(64, 64, 3))
            assert not episode["action"][0].any()
            assert one_hot(episode["action"][1:])
            assert episode["is_terminal"][-1] == episode["reward"][-1]


def test_the_actor_is_one_hot_and_learns_by_reinforce(runs: Path) -> None:
    agent, config, step = load_agent(runs / "fine", torch.device("cpu"))
    assert step == 60
    assert config.behavior.actor_grad == "auto"
    assert agent.behavior.actor_grad == "reinforce"
    assert agent.behavior.actor.std is None
    image, first = torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.ones(2, dtype=torch.bool)
    for explore in (True, False):
        action, _ = agent.act(image, first, None, explore=explore)
        assert one_hot(action.numpy())


def test_it_is_evaluated_and_collects(runs: Path) -> None:
    apv(f"evaluate {runs}/fine --episodes 2 --device cpu")
    scores = json.loads((runs / "fine" / "evaluation.json").read_text())
    assert 0 <= scores["eval_success"] <= 1
    apv(f"collect --env {CORRIDOR} --policy {runs}/fine --episodes 1 --out {runs}/again --world.action-repeat 1")
    (path,) = (runs / "again" / "train_episodes").iterdir()
    assert one_hot(read_episode(path, EPISODE_KEYS, image_shape=(64, 64, 3))["action"][1:])


# Looks


def test_a_model_of_another_look_is_warned_about(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"finetune --env {CORRIDOR} --pretrained {runs}/pre --steps 1 --prefill 1 {SMALL} --behavior.units 8"
    warning = f"world.quality is fast, but {runs}/pre has learnt from videos of quality paper"
    for quality, warned in (("fast", True), ("paper", False)):
        apv(f"{command} --out {runs}/{quality} --world.quality {quality}")
        assert (warning in capsys.readouterr().err) == warned


def test_videos_of_several_looks_are_warned_about(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apv(f"collect --env {CORRIDOR} --episodes 1 --out {runs}/other --world.action-repeat 1 --world.quality fast")
    apv(f"pretrain --data {runs}/data {runs}/other --out {runs}/mixed --steps 1 {SMALL}")
    assert "the videos are rendered in several looks, quality fast and paper" in capsys.readouterr().err
    apv(f"pretrain --data {runs}/data --out {runs}/plain --steps 1 {SMALL}")
    assert "several looks" not in capsys.readouterr().err
