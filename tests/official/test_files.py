"""Reading what the official implementation wrote, and nothing worse."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apv_fast.official import CHECKPOINT, read_arrays, read_checkpoint, read_model
from apv_fast.run import CheckpointError
from tests.parity import compare
from tests.support import GOLDEN

WEIGHTS = GOLDEN / "official_checkpoint"


def test_checkpoint_and_episode_agree() -> None:
    (episode,) = (GOLDEN / "official_episodes").glob("*.npz")
    for path in (WEIGHTS, episode):
        report = compare(path)
        assert report.passed, report


def test_checkpoint_has_the_weights_of_the_pretraining_file() -> None:
    weights = read_checkpoint(WEIGHTS)
    with np.load(GOLDEN / "pretrain_metaworld.npz", allow_pickle=False) as golden:
        assert {f"w.{name}" for name in weights} == {name for name in golden.files if name.startswith("w.")}
        for name, array in weights.items():
            np.testing.assert_array_equal(array, golden[f"w.{name}"], err_msg=name)


# Pickles


class _Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/apv_fast_was_here",)


_OBJECTS = np.array([_Malicious()], dtype=object)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((_Malicious(),), "posix.system"),
        ((np.zeros(3), [_Malicious()]), "posix.system"),
        ((_OBJECTS,), "posix.system"),
        (np.float32, "numpy.float32"),
        ((np.array([None]),), "has dtype object"),
        ({"a": 1}, "holds a dict"),
        (np.zeros(3), "holds a ndarray"),
        ([np.zeros(3), "text"], "item 1: is a str"),
        ((np.arange(3),), "has dtype int64"),
        ((np.array([1.0, np.nan]),), "has NaN"),
    ],
)
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_anything_but_weights_is_refused(
    tmp_path: Path, content: object, message: str, protocol: int
) -> None:
    path = tmp_path / "variables.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(CheckpointError) as error:
        read_arrays(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert not Path("/tmp/apv_fast_was_here").exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_of_every_protocol(tmp_path: Path, protocol: int, dtype: Any) -> None:
    arrays = (np.arange(6, dtype=dtype).reshape(2, 3), np.asfortranarray(np.ones((3, 2), dtype)), np.zeros((), dtype))
    path = tmp_path / "variables.pkl"
    path.write_bytes(pickle.dumps(arrays, protocol))
    for ours, official in zip(read_arrays(path), arrays, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, official)


def test_arrays_that_an_old_numpy_wrote(tmp_path: Path) -> None:
    path = tmp_path / "variables.pkl"
    content = pickle.dumps((np.arange(3.0),), 4)
    assert content.count(b"numpy._core") == 1
    start = content.index(b"numpy._core.multiarray") - 1  # protocol 4: a length in front of every short string
    assert content[start] == len("numpy._core.multiarray")
    old = content[:start] + b"\x15numpy.core.multiarray" + content[start + 23 :]
    path.write_bytes(old.replace(content[2:11], b"\x95" + (len(old) - 11).to_bytes(8, "little"), 1))
    np.testing.assert_array_equal(read_arrays(path)[0], np.arange(3.0))


@pytest.mark.parametrize("size", [0, 1, 100, -20])
def test_a_damaged_pickle(tmp_path: Path, size: int) -> None:
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "rssm_variables.pkl"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"rssm_variables.pkl: pickle: is damaged"):
        read_checkpoint(tmp_path)


# Checkpoints


def _write(folder: Path, part: str, arrays: list[np.ndarray]) -> None:
    (folder / f"{part}_variables.pkl").write_bytes(pickle.dumps(tuple(arrays)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the official checkpoint, to change."""
    return Path(shutil.copytree(WEIGHTS, tmp_path / "official"))


def test_a_checkpoint_with_missing_arrays_is_an_error(folder: Path) -> None:
    for part in CHECKPOINT:
        _write(folder, part, [np.zeros(3, np.float32)])
    with pytest.raises(
        CheckpointError, match=r"encoder_variables.pkl: arrays: there are 1; .* must be 8: conv0.kernel"
    ):
        read_checkpoint(folder)


def test_incomplete_and_fine_tuned_checkpoints(folder: Path) -> None:
    shutil.copy(folder / "rssm_variables.pkl", folder / "af_rssm_variables.pkl")
    with pytest.raises(CheckpointError, match="this is a fine-tuning checkpoint"):
        read_checkpoint(folder)
    (folder / "af_rssm_variables.pkl").unlink()
    (folder / "decoder_variables.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"decoder_variables.pkl not found"):
        read_checkpoint(folder)


def test_sizes_come_from_the_shapes(folder: Path) -> None:
    sizes = read_model(folder, discrete=5).sizes
    assert vars(sizes) == {
        **{"deter": 48, "hidden": 40, "stoch": 6, "discrete": 5, "action_pad": 50, "cnn_depth": 4},
        "precision": "fp32",
    }


def test_gaussian_latents_are_recognised(folder: Path) -> None:
    arrays = read_arrays(folder / "rssm_variables.pkl")
    for index in (4, 5, 10, 11):  # img_dist and obs_dist: mean and standard deviation of as many latents
        arrays[index] = np.concatenate([arrays[index]] * 2, -1)
    _write(folder, "rssm", arrays)
    sizes = read_model(folder).sizes
    assert (sizes.stoch, sizes.discrete) == (30, 0)


def test_files_of_different_models(folder: Path) -> None:
    arrays = read_arrays(folder / "decoder_variables.pkl")
    arrays[8] = arrays[8][:-3]
    _write(folder, "decoder", arrays)
    with pytest.raises(CheckpointError, match=r"latents of width 27 .* do not fit 30 statistics"):
        read_model(folder, discrete=5)


def test_images_of_one_channel(folder: Path) -> None:
    arrays = read_arrays(folder / "encoder_variables.pkl")
    arrays[0] = arrays[0][:, :, :1]
    _write(folder, "encoder", arrays)
    with pytest.raises(CheckpointError, match="images with 1 channels"):
        read_model(folder, discrete=5)
