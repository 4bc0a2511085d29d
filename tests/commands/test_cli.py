"""The command line: help, presets, and what a user who got something wrong is told."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from apv_fast import config as configs
from apv_fast.backend import BackendError
from apv_fast.cli import COMMANDS, main, parse
from apv_fast.commands.finetune import finetune
from apv_fast.commands.parts import device
from apv_fast.commands.pretrain import pretrain
from apv_fast.config import PRESETS, ConfigError, FinetuneConfig, PretrainConfig, from_dict, to_dict
from apv_fast.cpu import ISA_VARIABLE
from apv_fast.cpu import probe as cpu_probe
from apv_fast.data import DiskError, write_episode
from apv_fast.run import latest_checkpoint, load_checkpoint
from tests.support.command_line import refused
from tests.support.samples import make_episode, small_files

MODEL = "--model.deter 8 --model.hidden 8 --model.stoch 3 --model.discrete 4 --model.cnn-depth 2 --batch 2 --length 8"
PRETRAIN = f"{MODEL} --device cpu --log-every 4 --checkpoint-every 2 --video-every 1000"
WORLD = "--world.action-repeat 20 --world.time-limit 300 --world.quality fast"
FINETUNE = (
    f"--env dmc:cartpole-swingup --prefill 15 --first-updates 2 --steps 20 {MODEL} {WORLD} --behavior.units 8 "
    "--behavior.horizon 3 --device cpu --checkpoint-every 1000"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes in a folder."""
    folder = tmp_path_factory.mktemp("data")
    for seed in range(2):
        write_episode(folder, make_episode(12, seed=seed, video_only=True))
    return folder


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run."""
    run = tmp_path_factory.mktemp("pretrain") / "run"
    assert main(f"pretrain --data {data} --out {run} --steps 4 {PRETRAIN}".split()) == 0
    return run


# Help


def fields(kind: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Every option of a configuration and the text under it in the source."""
    source = Path(inspect.getfile(kind)).read_text()
    body = source.split(f"class {kind.__name__}:")[1].split("\n@dataclass")[0].split("\nclass ")[0]
    texts = dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', body, re.DOTALL | re.MULTILINE))
    options = []
    for field in dataclasses.fields(kind):
        nested = getattr(configs, str(field.type), None)
        if dataclasses.is_dataclass(nested):
            options += fields(nested, f"{prefix}{field.name}.")
        else:
            options.append((f"{prefix}{field.name}".replace("_", "-"), texts[field.name]))
    return options


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    plain = " ".join(re.sub(r"[│─╭╮╰╯]", " ", page).split())
    command = COMMANDS[name]
    every = () if command.preset else dataclasses.fields(command.config)
    unnamed = {field.name for field in every if field.default is field.default_factory is dataclasses.MISSING}
    for option, text in fields(command.config):  # what must be given has no name on the command line, but with presets
        shown = r"PATH|STR" if option in unnamed else f"--{option} "
        assert re.search(shown, plain.replace(",", " ")), option
        assert " ".join(text.split()) in plain, f"{option}: {text}"


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"\n  {name} " in page for name in COMMANDS)
    assert main([]) == 2


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    report = capsys.readouterr().out
    for word in ("apv-fast 0.", "Python 3.", "torch 2.", "mujoco 3.", "backend reference: on cpu", "backend cuda: not"):
        assert word in report


# Wrong command lines


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fintune", "unknown command 'fintune'; the commands are: collect, ingest, shards, pretrain, finetune"),
        ("finetune", r"--env STR[\s\S]*--out PATH"),
        ("pretrain --out x", "--data"),
        ("pretrain --preset big", "invalid choice: 'big'"),
        ("pretrain --data a --out b --modle.deter 7", "--model.deter INT"),
        ("pretrain --data a --out b --steps many", "many"),
        ("pretrain --data a --out b --backend gpu", "gpu"),
    ],
)
def test_wrong_command_lines(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(command.split())
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


# Presets


def test_presets_are_defaults() -> None:
    options = "--out x --batch 3 --behavior.units 7"
    config = parse("finetune", f"--preset small --env dmc:walker-run {options}".split())
    small = PRESETS["small"].finetune
    behavior = dataclasses.replace(small.behavior, units=7)
    assert config == dataclasses.replace(small, env="dmc:walker-run", out=Path("x"), batch=3, behavior=behavior)
    for name in PRESETS:
        config = parse("pretrain", ["--preset", name, "--data", "a", "b", "--out", "x"])
        assert config == dataclasses.replace(PRESETS[name].pretrain, data=(Path("a"), Path("b")), out=Path("x"))
    assert parse("collect", ["--env", "e", "--out", "x"]).world.action_repeat == 2, "dmc without --preset"


@pytest.mark.parametrize(
    ("options", "stacked"),
    [("", True), ("--no-bonus", False), ("--no-bonus --stacked", True), ("--no-bonus --pretrained p", True)],
)
def test_plain_dreamer_has_one_rssm(options: str, stacked: bool) -> None:
    assert parse("finetune", f"--env e --out x {options}".split()).stacked is stacked


# The saved configuration


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_a_saved_configuration_comes_back(kind: type, tmp_path: Path) -> None:
    for preset in PRESETS.values():
        config = preset.pretrain if kind is PretrainConfig else preset.finetune
        assert from_dict(kind, json.loads(json.dumps(to_dict(config))), tmp_path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"novelty": 1}, "config.json: novelty: is not a setting of this version"),
        ({"model": {"deter": 8, "novelty": 1}}, r"config.json: model\.novelty: is not a setting"),
        ({"batch": "many"}, "config.json: batch: .* integer"),
        ({"model": {"deter": "x"}}, r"config.json: model\.deter: .* integer"),
    ],
)
def test_strange_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(PretrainConfig, to_dict(PRESETS["dmc"].pretrain) | change, Path("config.json"))


# What cannot be done says so, and leaves nothing behind


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("collect --env dmc:walker-wlak", "unknown task 'walker-wlak' .*did you mean walker-walk.*cartpole-balance"),
        ("collect --env atari64:ant", "unknown suite 'atari64'; the suites are: dmc"),
        ("collect --env dmc:walker-walk --world.camera roof", "camera must be .*not 'roof'"),
        ("collect --env dmc:walker-walk --policy nobody", "nobody is not a run directory"),
        ("finetune --env dmc:walker-wlak", "unknown task 'walker-wlak'"),
        ("finetune --env dmc:walker-walk --batch 0", "batch is 0; it must be at least 1"),
        ("finetune --env dmc:walker-walk --length 4", r"length is 4; it must be at least video_bonus\.window = 5"),
        ("finetune --env dmc:walker-walk --seed -1", "seed is -1"),
        (f"finetune {FINETUNE} --model.action-pad 0", "action_dim is 1; it must be between 0 and action_pad = 0"),
        (f"finetune {FINETUNE} --pretrained nobody", "nobody is not a run directory: it has no config.json"),
        (
            f"finetune {FINETUNE} --pretrained PRE --model.deter 9",
            r"step-0+4\.pt: model\.decoder\.dense.* must be a tensor",
        ),
        ("pretrain --data nowhere", "nowhere: path: does not exist"),
        (f"pretrain --data DATA {PRETRAIN} --model.hidden 0", r"model\.hidden is 0; it must be at least 1"),
        (f"pretrain --data DATA {PRETRAIN} --length 14", "none is usable .0 damaged, 2 with fewer than 14 frames"),
        (f"pretrain --data DATA {PRETRAIN} --backend cuda", "backend 'cuda' cannot run here: "),
        (f"pretrain --data DATA {PRETRAIN} --resume", "is not a run directory"),
    ],
)
def test_nothing_is_left_behind(
    command: str, message: str, data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = command.replace("PRE ", f"{pretrained} ").replace("DATA ", f"{data} ")
    assert re.search(message, refused(f"{command} --out {tmp_path / 'out'}", capsys))
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = refused(f"pretrain --data {data} --out x --device cuda", capsys)
    assert "device is 'cuda', but torch sees no CUDA device; use --device cpu" in error


def test_the_environment_names_the_backend(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("APV_FAST_BACKEND", "abacus")
    assert "APV_FAST_BACKEND: unknown backend 'abacus'" in refused(f"pretrain --data {data} --out x", capsys)


def test_directories_in_use(data: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(f"pretrain --data {data} --out {pretrained} {PRETRAIN}", capsys)
    assert "is not empty: continue that run with --resume, choose another directory with --out" in error
    error = refused(f"collect --env dmc:cartpole-balance --out {pretrained}", capsys)
    assert "is not empty and was not made by apv-fast collect" in error


def test_runs_of_the_wrong_kind(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a pre-training run" in refused(f"evaluate {pretrained}", capsys)
    assert "is not a run directory" in refused(f"evaluate {tmp_path}", capsys)
    assert "is not a run directory" in refused(f"video {tmp_path}", capsys)
    assert "runs is empty" in refused("plot", capsys)
    assert "has no metric 'eval_return'; it has: data_wait, grad_norm, " in refused(f"plot {pretrained}", capsys)
    config = dataclasses.replace(PRESETS["small"].finetune, env="dmc:cartpole-balance")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    error = refused(f"finetune {FINETUNE} --out {tmp_path / 'new'} --pretrained {tmp_path}", capsys)
    assert f"pretrained: {tmp_path} is a fine-tuning run; it must be one of apv-fast pretrain" in error
    assert not (tmp_path / "new").exists()
    assert "has no checkpoint yet" in refused(f"evaluate {tmp_path}", capsys)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(f"finetune --resume --out {tmp_path}", capsys)


# Damage, and a full disk


def test_damaged_episodes_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    paths = [write_episode(folder, make_episode(12, seed=seed, video_only=True)) for seed in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[2].write_bytes(b"")
    small = make_episode(12, video_only=True)
    small["image"] = small["image"][:, ::2, ::2]
    paths[3].unlink()
    paths[3] = write_episode(folder, small)
    command = f"pretrain --data {folder} {PRETRAIN} --steps 1 --out {tmp_path}"
    assert main(f"{command}/run".split()) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    for line, (path, field) in zip(
        warnings, [(paths[3], "image: must be uint8"), (paths[2], "archive"), (paths[1], "archive")], strict=True
    ):
        assert line.startswith(f"apv-fast pretrain: warning: skipped a damaged episode: {path}: {field}")
    paths[0].unlink()
    assert "episodes: none is usable (3 damaged, 0 with" in refused(f"{command}/none", capsys)
    assert not (tmp_path / "none").exists()


def test_damaged_checkpoints(data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(f"pretrain --data {data} --out {run} --steps 4 {PRETRAIN}".split()) == 0
    newest = run / "checkpoints" / "step-000000000004.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    capsys.readouterr()
    assert main(f"pretrain --resume --out {run}".split()) == 0
    assert f"warning: skipped a checkpoint: {newest}: archive" in capsys.readouterr().err
    assert load_checkpoint(newest)[0] == 4, "lived through again"
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"damage")
    assert re.search(r"step-0+2\.pt: archive: ", refused(f"pretrain --resume --out {run}", capsys))
    error = refused(f"finetune {FINETUNE} --pretrained {run} --out {tmp_path / 'new'}", capsys)
    assert re.search(r"step-0+2\.pt: archive: ", error)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_full_disk_loses_nothing(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = f"--data {data} {PRETRAIN}" if command == "pretrain" else FINETUNE
    options += " --model.cnn-depth 8 --checkpoint-every 2 --steps 2"  # a checkpoint larger than the decoded frames
    assert main(f"{command} {options} --out {run}".split()) == 0
    before = latest_checkpoint(run / "checkpoints")
    assert before is not None
    episodes = sorted(run.glob("train_episodes/*"))
    with small_files(before.stat().st_size // 2):
        error = refused(f"{command} --resume --out {run} --steps 18", capsys)
    assert f"cannot write {run}/checkpoints/step-" in error and "MiB are free there" in error
    assert latest_checkpoint(run / "checkpoints") == before
    assert load_checkpoint(before)[0] == 2
    assert sorted(run.glob("train_episodes/*"))[: len(episodes)] == episodes
    assert not list(run.rglob("*.tmp"))
    assert main(f"{command} --resume --out {run} --steps 18".split()) == 0
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None and load_checkpoint(newest)[0] == 18


def test_the_library_raises_what_the_command_line_reports(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        pretrain(dataclasses.replace(PRESETS["small"].pretrain, data=(data,), out=tmp_path / "run", steps=0))
    with pytest.raises(ConfigError, match="unknown task"):
        finetune(dataclasses.replace(PRESETS["small"].finetune, env="dmc:nothing", out=tmp_path / "run"))
    assert issubclass(DiskError, OSError)


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a run on plain PyTorch that nobody asked for."""
    monkeypatch.setenv(ISA_VARIABLE, "avx-512")
    monkeypatch.setattr(device, "probe", lambda _: cpu_probe())
    with pytest.raises(BackendError, match="unknown instruction set 'avx-512'"), device.computing(0, "cpu", "auto"):
        pass
