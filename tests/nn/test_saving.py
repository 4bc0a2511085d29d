"""Modules written to folders and read back."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apv_fast.data import DiskError
from apv_fast.nn import RSSM, Actor, Critic, Decoder, Encoder, MLPHead, SavedModuleError, StackedRSSM, VideoBonus
from apv_fast.nn.saving import Savable
from tests.support.samples import small_files

SIZES: dict[str, Any] = {"deter": 5, "hidden": 4, "stoch": 3}
MODULES: dict[str, Callable[[], Savable]] = {
    "encoder": lambda: Encoder(2),
    "decoder": lambda: Decoder(6, depth=2),
    "rssm": lambda: RSSM(7, 2, discrete=4, dtype=torch.bfloat16, **SIZES),
    "gaussian": lambda: RSSM(7, discrete=0, min_std=0.2, **SIZES),
    "stack": lambda: StackedRSSM(
        RSSM(7, discrete=4, **SIZES), RSSM(24, 2, discrete=4, backend="reference", **SIZES), concat_embed=True
    ),
    "bonus": lambda: VideoBonus(6, queue_size=9, projection_dim=3, k=2, reduce="kth"),
    "head": lambda: MLPHead(6, layers=1, units=3, dist="bernoulli"),
    "critic": lambda: Critic(6, layers=2, units=3),
    "actor": lambda: Actor(6, 2, layers=1, units=3, min_std=0.3),
    "discrete actor": lambda: Actor(6, 2, discrete=True, layers=1, units=3),
}


def same(a: Savable, b: Savable) -> bool:
    """Both have the same tensors, and the same settings at every depth."""
    first, second = a.state_dict(), b.state_dict()
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return equal and all(
        getattr(x, name, None) == getattr(y, name, None)
        for x, y in zip(a.modules(), b.modules(), strict=True)
        for name in ("dtype", "dist", "min_std", "latent", "k", "window", "reduce", "concat_embed", "action_dim")
    )


@pytest.mark.parametrize("name", MODULES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = MODULES[name]()
    if isinstance(module, VideoBonus):
        module(torch.randn(2, 6, 6))
    folder = module.save_pretrained(tmp_path / "deep" / name)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    torch.manual_seed(2)
    for source in (folder, str(folder), folder / "model.safetensors"):
        again = type(module).from_pretrained(source)
        assert type(again) is type(module)
        assert same(module, again)
    assert not same(module, MODULES[name]()) or name == "bonus"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_can_be_saved_too(duplicate: Callable[[Savable], Savable], tmp_path: Path) -> None:
    module = MODULES["stack"]()
    folder = duplicate(module).save_pretrained(tmp_path)
    assert same(StackedRSSM.from_pretrained(folder), module)


def test_the_description_is_readable(tmp_path: Path) -> None:
    MODULES["rssm"]().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": 1,
        "class": "RSSM",
        "arguments": {"embed_dim": 7, "action_dim": 2, "discrete": 4, "dtype": "bfloat16", **SIZES},
    }


def test_changes(tmp_path: Path) -> None:
    MODULES["rssm"]().save_pretrained(tmp_path)
    module = RSSM.from_pretrained(tmp_path, dtype=torch.float32, backend="reference")
    assert (module.dtype, module.backend) == (torch.float32, "reference")
    assert RSSM.from_pretrained(tmp_path).backend == "auto"
    with pytest.raises(SavedModuleError, match=r"gru.bias is \[15\]; RSSM with these arguments has \[18\]"):
        RSSM.from_pretrained(tmp_path, deter=6)
    with pytest.raises(SavedModuleError, match="unexpected keyword argument 'colour'"):
        RSSM.from_pretrained(tmp_path, colour=6)
    with pytest.raises(SavedModuleError, match="stoch is 0; it must be at least 1"):
        RSSM.from_pretrained(tmp_path, stoch=0)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(SavedModuleError, match=r"model.safetensors does not exist|no such"):
        RSSM.from_pretrained(tmp_path)
    MODULES["critic"]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(SavedModuleError, match="holds a module of class Critic, not Actor"):
        Actor.from_pretrained(tmp_path)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(SavedModuleError, match="does not say which module it holds"):
        Critic.from_pretrained(tmp_path)
    save_file(tensors, path, {"apv_fast": '{"format": 2, "class": "Critic", "arguments": {}}'})
    with pytest.raises(SavedModuleError, match="of format 2; this version reads format 1"):
        Critic.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SavedModuleError, match="cannot be read"):
        Critic.from_pretrained(tmp_path)


def test_missing_tensors(tmp_path: Path) -> None:
    MODULES["critic"]().save_pretrained(tmp_path)
    path, text = tmp_path / "model.safetensors", (tmp_path / "config.json").read_text()
    tensors = load_file(path)
    del tensors["out.bias"]
    save_file(tensors, path, {"apv_fast": text})
    with pytest.raises(SavedModuleError, match=r"out.bias is missing; Critic with these arguments has \[1\]"):
        Critic.from_pretrained(tmp_path)


def test_what_was_there_survives_a_full_disk(tmp_path: Path) -> None:
    module = MODULES["decoder"]()
    module.save_pretrained(tmp_path)
    with small_files(1000), pytest.raises(DiskError, match=r"model.safetensors"):
        MODULES["decoder"]().save_pretrained(tmp_path)
    assert same(Decoder.from_pretrained(tmp_path), module)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
