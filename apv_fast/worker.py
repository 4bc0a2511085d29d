"""How a process begins that works for another one."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def interrupt_held() -> Iterator[None]:
    """Start children inside: they inherit a Ctrl-C that waits, from before they can say what to do with one.

    Else those that are still importing print where they were interrupted, and die. Here it waits until the block ends.
    """
    resource_tracker.ensure_running()  # started with the first child it would take the mask away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Call it first in a child of :mod:`multiprocessing`, begun inside :func:`interrupt_held`.

    Ctrl-C goes to every process, and is the parent's to handle. A parent that is killed cannot tell its children:
    they end with it. Mesa's software renderer takes one thread a process, unless ``LP_NUM_THREADS`` says otherwise.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.setdefault("LP_NUM_THREADS", "1")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
