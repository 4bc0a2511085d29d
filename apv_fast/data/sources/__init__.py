"""Readers of the videos that users have: files, folders of frames, episodes, datasets of robots.

:func:`open_source` finds what there is in a path; each :class:`Source` that it gives is read in one go and can be sent
to another process. Frames come one by one, already small, so memory does not depend on the length of a video.
"""

from apv_fast.data.sources.clip import Aspect, Clip, ClipOptions, Source, SourceError
from apv_fast.data.sources.find import open_source

__all__ = ["Aspect", "Clip", "ClipOptions", "Source", "SourceError", "open_source"]
