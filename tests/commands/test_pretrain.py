"""``apv-fast pretrain`` on videos of several kinds: validation, pictures, what it says, resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from apv_fast.agent import Pretrainer
from apv_fast.agent.validation import validation_loss
from apv_fast.cli import main
from apv_fast.config import ModelConfig, PretrainConfig
from apv_fast.data import VideoStore
from apv_fast.run import latest_checkpoint, load_checkpoint, read_metrics
from tests.support.video_sources import make_folder, make_store, open_, video

SMALL = (
    "--model.deter 8 --model.hidden 8 --model.stoch 3 --model.discrete 4 --model.cnn-depth 2 --batch 2 --length 8 "
    "--device cpu --log-every 5"
)
MODEL = ModelConfig(deter=8, hidden=8, stoch=3, discrete=4, cnn_depth=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store and a folder, with weights."""
    folder = tmp_path_factory.mktemp("data")
    make_store(folder / "store", [12, 20, 9, 15, 30], quality="fast")
    make_folder(folder / "folder", [9, 14, 10])
    return f"{folder / 'store'}:0.7 {folder / 'folder'}:0.3"


def run(data: str, out: Path, options: str) -> None:
    """A run that must succeed."""
    assert main(f"pretrain --data {data} --out {out} {SMALL} {options}".split()) == 0


def learnt(run: Path) -> dict[str, Any]:
    """Weights, moments and the state of torch's generator at the end."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    state = load_checkpoint(path)[1]
    weights = {**state["trainer"]["model"], "rng": state["rng"]["torch"]}
    moments = state["trainer"]["optimizer"]["state"]
    return weights | {f"{i}.{k}": value for i, one in moments.items() for k, value in one.items()}


def test_looking_does_not_change_what_is_learnt(data: str, tmp_path: Path) -> None:
    often, never = (
        "--validate-every 2 --video-every 3 --prefetch 3",
        "--validate-every 99 --video-every 99 --prefetch 0",
    )
    run(data, tmp_path / "often", f"--steps 10 --validation 0.2 {often}")
    run(data, tmp_path / "never", f"--steps 10 --validation 0.2 {never}")
    one, other = learnt(tmp_path / "often"), learnt(tmp_path / "never")
    assert one.keys() == other.keys() and len(one) > 60
    assert [name for name in one if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))] == []
    lines = {line["step"]: line for line in read_metrics(tmp_path / "often" / "metrics.jsonl") if "val_loss" in line}
    assert list(lines) == [2, 4, 6, 8, 10]
    last = [line for line in read_metrics(tmp_path / "never" / "metrics.jsonl") if "val_loss" in line]
    assert [line["val_loss"] for line in last] == [lines[10]["val_loss"]]


def test_without_validation(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, tmp_path / "run", "--steps 4 --validation 0 --validate-every 1")
    assert "pretrain: 4 updates, 8 episodes (119 frames), from the host, batches of 2" in capsys.readouterr().err
    assert not any("val_loss" in line for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert (tmp_path / "run" / "plots" / "image_loss.png").exists()
    assert main(["video", str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "run" / "videos").iterdir())) == 1


def test_a_resumed_run_is_the_same_run(data: str, tmp_path: Path) -> None:
    options = "--validate-every 2 --checkpoint-every 3"
    run(data, tmp_path / "whole", f"--steps 9 {options}")
    run(data, tmp_path / "parts", f"--steps 4 {options}")
    run(data, tmp_path / "parts", "--steps 9 --resume --prefetch 0")
    one, other = learnt(tmp_path / "whole"), learnt(tmp_path / "parts")
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def make_pictures(folder: Path) -> Path:
    """Two videos as folders of pictures, as a user may have them."""
    for index, frames in enumerate((12, 15)):
        (folder / f"take {index}").mkdir(parents=True)
        for number, frame in enumerate(video(3, index, frames)):
            Image.fromarray(frame).save(folder / f"take {index}" / f"{number}.png")
    return folder


@pytest.mark.parametrize("cache", ["", "--cache CACHE"])
def test_raw_videos_are_decoded_once(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, out = make_pictures(tmp_path / "pictures"), tmp_path / "run"
    cache = cache.replace("CACHE", str(tmp_path / "cache"))
    run(str(pictures), out, f"--steps 4 --validation 0.3 {cache}")
    (store,) = (tmp_path / "cache" if cache else out / "data").iterdir()
    assert store.name.startswith("pictures-")
    assert VideoStore(store).lengths.tolist() == [12, 15]
    assert "1 episodes (" in (said := capsys.readouterr().err) and "1 more held out" in said
    shutil.rmtree(pictures)
    run(str(pictures), out, "--steps 6 --resume")
    assert "6/6" in (said := capsys.readouterr().err) and "ingest" not in said
    assert main(["video", str(out)]) == 0
    assert "nothing to read" not in capsys.readouterr().err


def test_a_start_that_was_broken_off_while_it_decoded(tmp_path: Path) -> None:
    """What it had decoded is in the run directory, which is not a run yet."""
    pictures, out = make_pictures(tmp_path / "pictures"), tmp_path / "run"
    assert main(f"pretrain --data {pictures} --out {out} {SMALL} --length 16".split()) == 1
    assert [path.name for path in out.iterdir()] == ["data"]
    run(str(pictures), out, "--steps 2")


@pytest.mark.parametrize("discrete", [4, 0], ids=["categorical", "Gaussian"])
def test_the_validation_loss(tmp_path: Path, discrete: int) -> None:
    """It is the mean of the training loss over the batches, the same at every call, and moves no generator."""
    torch.manual_seed(0)
    config = PretrainConfig((), Path(), model=ModelConfig(8, 8, 3, discrete, cnn_depth=2), kl_scale=0.5)
    model = Pretrainer(config, torch.device("cpu")).model
    make_store(tmp_path, [9, 12])
    batches = list(open_(tmp_path).fixed(3, 2))
    before = torch.get_rng_state()
    values = validation_loss(model, batches)
    assert torch.equal(before, torch.get_rng_state())
    assert values == validation_loss(model, batches)
    losses = [model.loss(batch, noise=torch.tensor(i)).loss.item() for i, batch in enumerate(batches, 1)]
    assert values["val_loss"] == pytest.approx(sum(losses) / 2)
    assert values["val_loss"] == pytest.approx(0.5 * values["val_kl_loss"] + values["val_image_loss"])
    assert validation_loss(model, []) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data {store}:1 {folder}", "data: {folder} has no weight but others have"),
        ("--data {store}:0 {folder}:1", "data: the weight of {store} is 0"),
        ("--data {store}x", "{store}x: path: does not exist"),
        ("--data {store}/store.json", "{store}/store.json: file: .json is not known; what can be read: video files"),
        ("--data {store} --validation 1", "validation is 1.0; it must be at least 0 and less than 1"),
        ("--data {store} --prefetch -1", "prefetch is -1; it must be at least 0"),
        ("--data {store} --validate-every 0", "validate_every is 0; it must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    data: str, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, folder = (entry.rpartition(":")[0] for entry in data.split())
    names = {"store": store, "folder": folder}
    assert main(f"pretrain {options.format(**names)} --out {tmp_path / 'run'} {SMALL}".split()) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"apv-fast pretrain: {message.format(**names)}")
    assert not (tmp_path / "run").exists()
