"""Work as a CUDA graph, for timing."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CaptureError(RuntimeError):
    """A recording failed; torch's allocator may believe that it still goes on, so the process should record no more."""


class Captured:
    """A recorded ``work``: :meth:`replay` runs it again; ``result`` is what it returned, filled by every replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: object) -> None:
        self.graph, self.result = graph, result

    def replay(self) -> object:
        """Run it; does not wait."""
        self.graph.replay()
        return self.result


def capture(work: Callable[[], object], warm_up: int = 2) -> Captured:
    """Record ``work``, after running it ``warm_up`` times on the stream that records it.

    Raises:
        CaptureError: it can be run and not be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = work()
    except Exception as error:
        first = error.__context__ or error  # ending a recording that was broken off is an error too, which says less
        raise CaptureError(f"{type(first).__name__}: {first}") from error
    return Captured(graph, result)
