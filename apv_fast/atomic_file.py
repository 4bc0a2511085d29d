"""Files that are either complete or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"  # last in the name, so that no glob for finished files matches


class DiskError(OSError):
    """Something could not be written; the message names the file. What was there before is unchanged."""


def disk_error(path: Path, error: OSError) -> DiskError:
    """What to raise when writing ``path`` failed with ``error``."""
    try:
        free = f"; {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there"
    except OSError:
        free = ""
    return DiskError(error.errno, f"cannot write {path} ({error.strerror or error}){free}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes ``path`` if the block ends without an exception.

    After a crash at any moment ``path`` is what it was before or complete. A killed process can leave its temporary
    (``*.tmp``) behind; :func:`remove_temporaries` clears those.

    Raises:
        DiskError: the disk is full, or another error of the file system.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(directory: Path) -> int:
    """Delete what killed writers left in ``directory`` and below; only for the one process that writes there."""
    count = 0
    for path in directory.rglob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
        count += 1
    return count


def sync_directory(directory: Path) -> None:
    """Make new names in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
