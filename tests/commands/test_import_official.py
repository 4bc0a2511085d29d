"""``apv-fast import-official``: a run from official files that computes what the official implementation computed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apv_fast.agent import Pretrainer
from apv_fast.cli import main
from apv_fast.config import ConfigError, PretrainConfig, from_dict
from apv_fast.data import write_episode
from apv_fast.official import read_settings
from apv_fast.run import RunDirectory, latest_checkpoint, load_checkpoint
from tests.support import GOLDEN
from tests.support.samples import make_episode

CONFIG = """
kl: {free: 0.0, forward: false, balance: 0.8, free_avg: true}
rssm: {hidden: 40, deter: 48, stoch: 6, discrete: 5, act: elu, norm: none, std_act: sigmoid2, min_std: 0.1, ensemble: 1}
dataset: {batch: 2, length: 6}
loss_scales: {kl: 0.1}
model_opt: {opt: adam, lr: 0.0002, eps: 2e-05, clip: 90, wd: 3e-06}
replay: {capacity: 1000000.0, minlen: 6, maxlen: 6, ongoing: false, prioritize_ends: false}
task: metaworld_door_open
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What official pre-training leaves: weights, settings, episodes."""
    folder = tmp_path_factory.mktemp("official")
    shutil.copytree(GOLDEN / "official_checkpoint", folder, dirs_exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    for seed in range(2):
        write_episode(folder / "train_episodes", make_episode(12, seed=seed, video_only=True))
    return folder


@pytest.fixture(scope="module")
def imported(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run made of it."""
    run = tmp_path_factory.mktemp("import") / "run"
    before = {path: path.stat().st_mtime_ns for path in official.rglob("*")}
    assert main(f"import-official {official} --out {run}".split()) == 0
    assert before == {path: path.stat().st_mtime_ns for path in official.rglob("*")}
    return run


def test_the_loss_is_the_official_one(imported: Path) -> None:
    run = RunDirectory.open(imported)
    config = from_dict(PretrainConfig, run.config(), run.config_file)
    trainer = Pretrainer(config, torch.device("cpu"))
    path = latest_checkpoint(run.checkpoints)
    assert path is not None
    trainer.restore(load_checkpoint(path)[1]["trainer"], path)
    with np.load(GOLDEN / "pretrain_metaworld.npz", allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    noise = (torch.from_numpy(golden["post_gumbel"]), torch.from_numpy(golden["prior_gumbel"]))
    batch = {name: torch.from_numpy(golden[name]) for name in ("image", "is_first")}
    result = trainer.model.loss(batch, noise)
    torch.testing.assert_close(result.loss.item(), float(golden["loss"]), rtol=1e-6, atol=0)
    for name, value in result.metrics.items():
        torch.testing.assert_close(value.item(), float(golden[f"metric.{name}"]), rtol=1e-5, atol=0, msg=name)


def test_settings_come_from_the_official_config(imported: Path, official: Path) -> None:
    config = json.loads((imported / "config.json").read_text())
    assert (config["batch"], config["length"], config["kl_scale"], config["capacity"]) == (2, 6, 0.1, 1_000_000)
    assert config["optimizer"] == {"lr": 0.0002, "eps": 2e-5, "clip": 90, "weight_decay": 3e-6}
    assert config["prioritize_ends"] is False
    assert config["data"] == [str(official / "train_episodes")]


@pytest.mark.thorough
def test_the_run_is_of_use(imported: Path, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Open-loop videos, fine-tuning from it, exporting it, and going on with the pre-training."""
    gif = tmp_path / "video.gif"
    assert main(f"video {imported} --out {gif} --device cpu".split()) == 0
    assert gif.stat().st_size > 1000
    sizes = "--model.deter 48 --model.hidden 40 --model.stoch 6 --model.discrete 5 --model.cnn-depth 4"
    world = "--world.action-repeat 20 --world.time-limit 200 --world.quality fast"
    capsys.readouterr()
    again = tmp_path / "again"
    assert main(f"import-official {official} --out {again}".split()) == 0
    assert f"--pretrained {again} --out RUN {sizes}" in capsys.readouterr().out
    finetune = f"finetune --env dmc:cartpole-balance --pretrained {imported} --out {tmp_path / 'task'} {sizes} {world}"
    small = "--steps 12 --prefill 10 --first-updates 1 --batch 2 --length 5 --behavior.units 8 --behavior.horizon 2"
    assert main(f"{finetune} {small} --eval-episodes 1 --device cpu".split()) == 0
    assert main(f"pretrain --resume --out {again} --steps 2 --device cpu".split()) == 0
    assert latest_checkpoint(again / "checkpoints") == again / "checkpoints/step-000000000002.pt"


def _refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without config.yaml the number of classes is asked for; without episodes a video asks for some."""
    command = f"import-official {GOLDEN / 'official_checkpoint'} --out {tmp_path / 'run'}"
    error = _refusal(command, capsys)
    assert re.search(r"all latents together have 30 classes.*--discrete", error)
    assert "discrete is 7; it must divide 30" in _refusal(f"{command} --discrete 7", capsys)
    assert "discrete is -5; it must divide 30" in _refusal(f"{command} --discrete -5", capsys)
    assert "has no episodes" in _refusal(f"{command} --discrete 5 --data {tmp_path}", capsys)
    assert not (tmp_path / "run").exists()
    assert main(f"{command} --discrete 5".split()) == 0
    assert "give some with --data" in _refusal(f"video {tmp_path / 'run'} --device cpu", capsys)
    assert "is not empty" in _refusal(f"{command} --discrete 5", capsys)


def test_an_official_model_of_full_size_needs_no_option(tmp_path: Path) -> None:
    from apv_fast.official.checkpoint import _classes

    assert _classes(1024, tmp_path, None) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl: [", "config.yaml cannot be read"),
        ("- 1", "must hold settings by name, not a list"),
        ("rssm: {act: swish}", "rssm.act is 'swish'; only models with 'elu'"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_settings(tmp_path)


def test_a_wrong_setting_is_named(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(official, tmp_path / "official"))
    (folder / "config.yaml").write_text(CONFIG.replace("batch: 2", "batch: many"))
    error = _refusal(f"import-official {folder} --out {tmp_path / 'run'}", capsys)
    assert re.search(r"config.yaml: batch: .*many", error)


def _golden_export(run: Path, out: Path) -> Any:
    assert main(f"export {run} --out {out}".split()) == 0
    return json.loads((out / "config.json").read_text())


def test_export(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from apv_fast.nn import RSSM, Decoder, Encoder
    from apv_fast.official import our_layout, read_checkpoint

    out = tmp_path / "exported"
    assert _golden_export(imported, out) == json.loads((imported / "config.json").read_text())
    weights = read_checkpoint(GOLDEN / "official_checkpoint")
    encoder, rssm = Encoder.from_pretrained(out / "encoder"), RSSM.from_pretrained(out / "rssm")
    decoder = Decoder.from_pretrained(out / "decoder")
    assert torch.equal(encoder.get_parameter("convs.2.weight"), our_layout(weights["encoder.conv2.kernel"]))
    assert torch.equal(rssm.gru_norm.weight, our_layout(weights["rssm.gru.norm.gamma"]))
    assert torch.equal(decoder.dense.weight, our_layout(weights["decoder.convin.kernel"]))
    assert "is not empty" in _refusal(f"export {imported} --out {out}", capsys)
