"""Episode files: the official layout, or any npz with frames in ``image``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from apv_fast.data.episodes import EpisodeError, check_episode, episode_length, read_episode
from apv_fast.data.sources.clip import Clip, ClipOptions, Source, SourceError, cut, resize


@dataclass(frozen=True)
class EpisodeFile(Source):
    """One file, one episode; its other arrays, such as actions, are not read."""

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """See :class:`Source`; the episode is held in memory as a whole."""
        frames = (resize(image, options) for image in self._read())
        return cut(Clip.of_file(self, frames, None), options.max_frames)

    def _read(self) -> np.ndarray:
        """Frames uint8 ``[n, h, w, 3]``."""
        try:
            episode_length(self.path)
        except EpisodeError:  # not an official name, so it does not say the length
            try:
                with np.load(self.path, allow_pickle=False) as archive:
                    image = archive["image"]
            except Exception as error:
                problem = f"cannot be read as 'image' ({type(error).__name__}: {error})"
                raise SourceError(self.path, "archive", problem) from error
            return check_episode({"image": image}, self.path, length=len(image) - 1)["image"]
        return read_episode(self.path, ("image",))["image"]
