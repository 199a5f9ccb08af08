"""A directory to write into before what is whole there gets its name."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".part-"
_GRACE = 60  # seconds in which one that was just made gets its lock


@contextlib.contextmanager
def scratch_directory(root: Path) -> Iterator[Path]:
    """Makes a directory that is gone with the block; what is to stay is renamed out of it.

    Those that processes have left in `root` because they were killed are removed first.

    Args:
        root: made if need be.

    Yields:
        An empty directory in `root`, on the same file system.

    Raises:
        OSError: there can be none.
    """
    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob(f"{_PREFIX}*"):
        _remove_abandoned(path)
    part = root / f"{_PREFIX}{os.getpid()}-{time.time_ns()}"
    part.mkdir()
    lock = os.open(part, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # without locks it is never seen as abandoned
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(path: Path) -> None:
    # The lock of a process goes with it, however it ended.
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime < _GRACE:
            return
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        finally:
            os.close(lock)
