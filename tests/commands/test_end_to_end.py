"""The whole path on real environments at the smallest sizes: videos, pre-training, fine-tuning, crashes, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apv_fast.commands.parts.training_run import load_agent
from apv_fast.data import EPISODE_KEYS, VIDEO_KEYS, read_episode, write_episode
from apv_fast.run import load_checkpoint, read_metrics
from tests.support.runs import EPISODE, FINETUNE, PRETRAIN, WORLD, apv, differences, learnt, metrics_of, state_of

pytest.importorskip("dm_control")

# What the commands leave behind


def test_collected_videos(data: Path) -> None:
    files = sorted((data / "train_episodes").iterdir())
    assert len(files) == 2
    episodes = [read_episode(path, EPISODE_KEYS, image_shape=(64, 64, 3)) for path in files]
    for episode in episodes:
        assert len(episode["image"]) == EPISODE + 1
        assert episode["action"][1:].std() > 0 and not episode["action"][0].any()
    assert not np.array_equal(episodes[0]["image"], episodes[1]["image"])
    described = json.loads((data / "dataset.json").read_text())
    assert (described["env"], described["policy"], described["world"]["action_repeat"]) == (
        "dmc:cartpole-balance",
        "random",
        20,
    )


def test_collecting_goes_on_where_it_stopped(data: Path, tmp_path: Path) -> None:
    command = f"collect --env dmc:cartpole-balance --out {tmp_path / 'data'} {WORLD}"
    for episodes in (1, 2, 2):
        apv(f"{command} --episodes {episodes}")
    files = sorted((tmp_path / "data" / "train_episodes").iterdir())
    assert len(files) == 2
    for path, other in zip(files, sorted((data / "train_episodes").iterdir()), strict=True):
        np.testing.assert_array_equal(read_episode(path)["image"], read_episode(other)["image"])


def test_pretraining_leaves_a_complete_run(pretrained: Path) -> None:
    assert json.loads((pretrained / "config.json").read_text())["model"]["deter"] == 8
    lines = metrics_of(pretrained)
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12, 12]
    training = {"loss", "image_loss", "kl_loss", "model_kl", "prior_ent", "post_ent", "grad_norm"}
    held_out = {"val_loss", "val_image_loss", "val_kl_loss", "val_model_kl"}
    assert [line.keys() - {"step"} for line in lines] == [training, held_out, training, held_out, training, held_out]
    assert all(0 <= line.get("data_wait", 0) <= 1 for line in read_metrics(pretrained / "metrics.jsonl"))
    assert [path.name for path in sorted((pretrained / "checkpoints").iterdir())] == [
        "step-000000000009.pt",
        "step-000000000012.pt",
    ]
    assert_gifs(pretrained, "open_loop_00000006.gif", "open_loop_00000012.gif")
    assert_picture(pretrained / "plots" / "image_loss.png")
    assert_events(pretrained, {"image_loss"}, {"open_loop"})


def test_finetuning_leaves_a_complete_run(finetuned: Path) -> None:
    assert json.loads((finetuned / "config.json").read_text())["world"]["action_repeat"] == 20
    lines = metrics_of(finetuned)
    assert all(line["env_step"] == 20 * line["step"] for line in lines)
    by_name = {name: [line["step"] for line in lines if name in line] for line in lines for name in line}
    assert by_name["train_return"] == by_name["train_length"] == [15, 30, 45]
    assert by_name["eval_return"] == by_name["eval_return_std"] == [15, 35, 50]
    assert by_name["replay_steps"] == by_name["replay_episodes"] == [15, 25, 35, 45, 50]
    losses = {"kl_loss", "image_loss", "reward_loss", "af_kl_loss", "actor_loss", "critic_loss"}
    norms = {f"{name}_grad_norm" for name in ("model", "video", "actor", "critic")}
    others = {"intr_mean", "intr_normed_mean", "actor_ent", "critic", "imag_reward", "imag_target", "af_model_kl"}
    for name in losses | norms | others:
        assert by_name[name] == [25, 35, 45, 50], name  # the first report is of the untrained agent
    assert len(list((finetuned / "train_episodes").iterdir())) == 3
    assert_gifs(finetuned, *(f"{kind}_{step:08d}.gif" for kind in ("eval", "open_loop") for step in (15, 35, 50)))
    assert_picture(finetuned / "plots" / "eval_return.png")
    assert_events(finetuned, {"eval_return", "actor_loss"}, {"open_loop"})


def assert_gifs(run: Path, *names: str) -> None:
    assert sorted(path.name for path in (run / "videos").iterdir()) == sorted(names)
    for name in names:
        with Image.open(run / "videos" / name) as gif:
            assert gif.n_frames > 5  # type: ignore[attr-defined]


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def assert_events(run: Path, scalars: set[str], images: set[str]) -> None:
    events = EventAccumulator(str(run)).Reload().Tags()
    assert scalars <= set(events["scalars"])
    assert images == set(events["images"])


# The other commands


def test_evaluate(finetuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apv(f"evaluate {finetuned} --episodes 2 --seed 3")
    first = json.loads((finetuned / "evaluation.json").read_text())
    assert (first["step"], first["episodes"], first["eval_length"]) == (50, 2, EPISODE)
    printed = capsys.readouterr().out
    assert f"policy: return {first['eval_return']:.1f} ± " in printed
    assert f"random: return {first['random_return']:.1f} ± " in printed
    apv(f"evaluate {finetuned} --episodes 2 --seed 3")
    assert json.loads((finetuned / "evaluation.json").read_text()) == first


def test_video_and_plot(pretrained: Path, finetuned: Path, data: Path, tmp_path: Path) -> None:
    apv(f"video {pretrained} --out {tmp_path / 'pre.gif'}")
    apv(f"video {finetuned} --data {data} --out {tmp_path / 'fine.gif'}")
    for name in ("pre.gif", "fine.gif"):
        with Image.open(tmp_path / name) as gif:
            assert (gif.n_frames, gif.size) == (8, (2 * 6 * 64, 2 * 3 * 64))  # type: ignore[attr-defined]
    apv(f"plot {finetuned} --out {tmp_path / 'curve.png'} --task dmc_quadruped_walk")
    assert_picture(tmp_path / "curve.png")


def test_a_trained_policy_collects_videos(finetuned: Path, data: Path, tmp_path: Path) -> None:
    apv(f"collect --env dmc:cartpole-balance --policy {finetuned} --episodes 2 --out {tmp_path / 'data'} {WORLD}")
    (one, two) = [read_episode(path) for path in sorted((tmp_path / "data" / "train_episodes").iterdir())]
    random = read_episode(min((data / "train_episodes").iterdir()))
    np.testing.assert_array_equal(one["image"][0], random["image"][0], "the same start")
    assert not np.array_equal(one["action"], random["action"])
    assert not np.array_equal(one["action"], two["action"])


# Without actions, without parts of the method


def test_pretraining_never_sees_an_action(data: Path, pretrained: Path, tmp_path: Path) -> None:
    for path in sorted((data / "train_episodes").iterdir()):
        write_episode(tmp_path / "videos", read_episode(path, VIDEO_KEYS))
    shutil.copy(data / "dataset.json", tmp_path / "videos")  # how they were rendered
    apv(f"pretrain --data {tmp_path / 'videos'} --out {tmp_path / 'run'} --steps 12 {PRETRAIN}")
    assert differences(learnt(pretrained), learnt(tmp_path / "run")) == []


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "pre", "stacked", "bonus"),
    [
        pytest.param("--no-bonus", False, False, False, id="DreamerV2"),
        pytest.param("", False, True, True, id="stacked from scratch"),
        pytest.param("--no-stacked", True, False, True, id="no stacking"),
        pytest.param("--no-bonus", True, True, False, id="no bonus"),
        pytest.param("--discount-head --model.discrete 0 --video-bonus.exclude-self", False, True, True, id="Gaussian"),
    ],
)
def test_ablations(tmp_path: Path, pretrained: Path, options: str, pre: bool, stacked: bool, bonus: bool) -> None:
    run = tmp_path / "run"
    source = f"--pretrained {pretrained}" if pre else ""
    # Random actions for two episodes, a checkpoint in the second one, training from its end on.
    clocks = f"--prefill {EPISODE + 1} --steps {2 * EPISODE + 1} --checkpoint-every 1000"
    apv(f"finetune --out {run} {FINETUNE} {source} {options} {clocks}")
    agent, config, step = load_agent(run, torch.device("cpu"))
    model = agent.model
    assert (step, model.af_rssm is not None, model.bonus is not None) == (2 * EPISODE + 1, stacked, bonus)
    assert (config.stacked, config.bonus) == (stacked, bonus), "the saved configuration says so"
    names = set().union(*metrics_of(run))
    assert ("af_kl_loss" in names, "intr_mean" in names) == (stacked, bonus)
    if pre:
        start = load_checkpoint(run / "checkpoints" / "step-000000000016.pt")[1]["agent"]["model"]
        for name, weight in state_of(pretrained)["trainer"]["model"].items():
            name = name.replace("rssm.", "af_rssm.") if stacked and name.startswith("rssm.") else name
            assert torch.equal(start[name], weight), name


# The same again


def test_the_same_seed_gives_the_same_run(finetuned: Path, pretrained: Path, tmp_path: Path) -> None:
    for seed, steps in ((0, 50), (1, 15)):
        options = f"--pretrained {pretrained} --steps {steps} --seed {seed} {FINETUNE}"
        apv(f"finetune --out {tmp_path / str(seed)} {options}")
    assert metrics_of(tmp_path / "0") == metrics_of(finetuned)
    assert differences(learnt(tmp_path / "0"), learnt(finetuned)) == []
    assert metrics_of(tmp_path / "1")[0] != metrics_of(finetuned)[0]


def test_two_environments(finetuned: Path, pretrained: Path, tmp_path: Path) -> None:
    """Steps count in both together; the prefill's episodes are the same as in one, in whatever order they end."""
    run = tmp_path / "run"
    # 30 steps of prefill, and updates whenever 5 more have been taken: not always two in a step of both.
    apv(f"finetune --out {run} --pretrained {pretrained} --steps 60 {FINETUNE} --envs 2 --prefill 30 --train-every 5")
    alone, beside = (sorted((path / "train_episodes").iterdir()) for path in (finetuned, run))
    assert (len(alone), len(beside)) == (3, 4)
    first = read_episode(alone[0], EPISODE_KEYS)
    assert any(
        all(np.array_equal(first[key], read_episode(path, EPISODE_KEYS)[key]) for key in EPISODE_KEYS)
        for path in beside[:2]
    )
    lines = metrics_of(run)
    assert [line["step"] for line in lines if "train_return" in line] == [30, 30, 60, 60]
    agent, _, step = load_agent(run, torch.device("cpu"))
    assert (step, agent.updates) == (60, 2 + 30 // 5)
    assert state_of(run)["memory"]["action"].shape == (2, 1)
