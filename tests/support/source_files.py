"""What the tests of the readers of videos share."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apv_fast.data.sources import Clip, ClipOptions, Source, open_source
from tests.support.video_files import plain, write_video


def read(path: Path, **options: Any) -> dict[str, list[np.ndarray]]:
    """The frames of every clip in ``path``."""
    chosen = ClipOptions(**options)
    frames: dict[str, list[np.ndarray]] = {}
    for source in open_source(path, chosen):
        for clip in pickle.loads(pickle.dumps(source)).clips(chosen):
            assert clip.name not in frames
            frames[clip.name] = list(clip.frames)
            for frame in frames[clip.name]:
                assert frame.dtype == np.uint8 and frame.shape == (chosen.size, chosen.size, 3)
    return frames


def first_clip(path: Path, **options: Any) -> Clip:
    """Without its frames."""
    (source,) = open_source(path, ClipOptions(**options))
    return next(source.clips(ClipOptions(**options)))


def quarters(frame: np.ndarray) -> list[str]:
    """Colours of the four corners of a picture made by ``corners``, row by row."""
    names = {"100": "red", "010": "green", "001": "blue", "111": "white", "000": "black"}
    low, high = len(frame) // 4, 3 * len(frame) // 4
    picked = [frame[y, x] for y in (low, high) for x in (low, high)]
    assert all(value < 60 or value > 195 for pixel in picked for value in pixel)
    return [names["".join(str(int(value > 128)) for value in pixel)] for pixel in picked]


def first_clip_of(source: Source) -> Clip:
    return next(source.clips(ClipOptions()))


def write_frames(folder: Path, frames: list[np.ndarray], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}{suffix}")
    return folder


def write_lerobot(
    root: Path, lengths: list[int], *, cameras: tuple[str, ...] = ("observation.images.top",), pictures: bool = False
) -> Path:
    """A dataset of two files, in v3 of the format; every episode begins with frame 3·index."""
    import io

    import pyarrow
    import pyarrow.parquet

    def save(path: Path, rows: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def png(image: np.ndarray) -> dict[str, object]:
        Image.fromarray(image).save(packed := io.BytesIO(), "PNG")
        return {"bytes": packed.getvalue(), "path": None}

    features = {camera: {"dtype": "image" if pictures else "video", "shape": [80, 96, 3]} for camera in cameras}
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": {**features, "action": {"dtype": "float32", "shape": [2]}},
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    half = (len(lengths) + 1) // 2
    rows = []
    for file, indices in enumerate((range(half), range(half, len(lengths)))):
        video = [frame for index in indices for frame in plain(lengths[index], first=3 * index)]
        for camera in cameras:
            write_video(root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4", video or plain(1))
        frames = [
            {"episode_index": index, "action": [0.0, 1.0]} | {camera: png(image) for camera in cameras if pictures}
            for index in indices
            for image in plain(lengths[index], first=3 * index)
        ]
        save(root / f"data/chunk-000/file-{file:03d}.parquet", frames)
        begin = 0
        for index in indices:
            row: dict[str, Any] = {"episode_index": index, "length": lengths[index], "stats/action/mean": [0.0, 0.0]}
            row |= {"data/chunk_index": 0, "data/file_index": file}
            for camera in cameras:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
                row[f"videos/{camera}/from_timestamp"] = begin / 10
                row[f"videos/{camera}/to_timestamp"] = (begin + lengths[index]) / 10
            begin += lengths[index]
            rows.append(row)
    save(root / "meta/episodes/chunk-000/file-000.parquet", rows)
    return root


def write_hdf5(path: Path, cameras: tuple[str, ...] = ("agentview",), demos: int = 11) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for demo in range(demos):
            for camera in cameras:
                images = np.stack(plain(3 + demo, 84, 84, first=demo))
                file[f"data/demo_{demo}/obs/{camera}_image"] = images
            file[f"data/demo_{demo}/obs/robot0_eef_pos"] = np.zeros((3 + demo, 3))
    return path
