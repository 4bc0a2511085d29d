"""Reading what the official implementation wrote, and nothing worse."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.official_files import CHECKPOINT, read_arrays, read_checkpoint
from tests.parity import compare

GOLDEN = Path(__file__).parent / "golden"


def test_checkpoint_and_episode_agree() -> None:
    (episode,) = (GOLDEN / "official_episodes").glob("*.npz")
    for path in (GOLDEN / "official_checkpoint", episode):
        report = compare(path)
        assert report.passed, report


def test_checkpoint_has_the_weights_of_the_pretraining_file() -> None:
    weights = read_checkpoint(GOLDEN / "official_checkpoint")
    with np.load(GOLDEN / "pretrain_metaworld.npz", allow_pickle=False) as golden:
        assert weights.keys() == {name for name in golden.files if name.startswith("w.")}
        for name, array in weights.items():
            np.testing.assert_array_equal(array, golden[name], err_msg=name)


class _Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/apv_fast_was_here",)


@pytest.mark.parametrize("content", [(_Malicious(),), {"a": 1}, ("text",)])
def test_a_pickle_of_anything_else_is_refused(content: object) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read_arrays(io.BytesIO(pickle.dumps(content)))
    assert not Path("/tmp/apv_fast_was_here").exists()


def test_a_checkpoint_with_missing_arrays_is_an_error(tmp_path: Path) -> None:
    for part in CHECKPOINT:
        (tmp_path / f"{part}_variables.pkl").write_bytes(pickle.dumps((np.zeros(3, np.float32),)))
    with pytest.raises(ValueError, match=r"encoder_variables.pkl has 1 arrays; it must have 8: conv0.kernel"):
        read_checkpoint(tmp_path)
