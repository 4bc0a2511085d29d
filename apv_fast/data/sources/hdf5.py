"""HDF5 files as robomimic writes them: ``data/demo_0/obs/agentview_image``, uint8 ``[n, height, width, 3]``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from apv_fast.data.sources.clip import Clip, ClipOptions, Source, SourceError, cut, resample, resize
from apv_fast.data.sources.images import natural_order
from apv_fast.optional import optional

EXTENSIONS = frozenset((".hdf5", ".h5"))
_SUFFIX = "_image"


@dataclass(frozen=True)
class Hdf5File(Source):
    """One file; every demonstration is a video. If a camera was chosen, that is the end of the name."""

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """See :class:`Source`."""
        with h5py().File(self.path) as file:
            if not isinstance(file.get("data"), h5py().Group):
                raise SourceError(self.path, "data", "is missing; a robomimic file has data/demo_0/obs/…_image")
            fps = _rate(file["data"])
            for demo in natural_order(file["data"]):
                observations = file["data"][demo].get("obs", {})
                camera = self._choose_camera(demo, observations, options.camera)
                frames = _frames(observations[camera], fps, options)
                clip = Clip(f"{self.name}/{demo}", frames, (options.fps or fps) if fps else None)
                clip.camera = camera.removesuffix(_SUFFIX)
                clip.episode = f"{self.name.removesuffix(f'/{options.camera}')}/{demo}"
                yield from cut(clip, options.max_frames)

    def _choose_camera(self, demo: str, observations: Any, camera: str | None) -> str:
        cameras = [
            key for key, one in observations.items() if one.ndim == 4 and one.shape[-1] == 3 and one.dtype == np.uint8
        ]
        matches = [key for key in cameras if camera in (None, key, key.removesuffix(_SUFFIX))]
        if len(matches) != 1:
            problem = (
                f"{camera!r} is not one of those" if camera else "choose one of several with apv-fast ingest --camera"
            )
            there = ", ".join(key.removesuffix(_SUFFIX) for key in cameras)
            problem = f"{problem}; the cameras are: {there}" if cameras else "there are no uint8 images in obs"
            raise SourceError(self.path, f"camera of {demo}", problem)
        return matches[0]


def h5py() -> Any:
    """The module that reads HDF5; raises as :func:`apv_fast.optional.optional`."""
    return optional("h5py", "HDF5 files need", "hdf5")


def _frames(images: Any, fps: float | None, options: ClipOptions) -> Iterator[np.ndarray]:
    """Small frames; a few hundred large ones are in memory at a time."""
    rows: Iterator[np.ndarray] = (
        image for start in range(0, len(images), 128) for image in images[start : start + 128]
    )
    if options.fps and fps:
        timed = ((number / fps, image) for number, image in enumerate(rows))
        rows = resample(timed, options.fps, 1 / fps)
    return (resize(image, options) for image in rows)


def _rate(data: Any) -> float | None:
    """Frames a second, if the file says."""
    try:
        return float(json.loads(data.attrs["env_args"])["env_kwargs"]["control_freq"])
    except (KeyError, ValueError, TypeError):
        return None
