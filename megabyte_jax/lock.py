"""One trainer per work directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megabyte_jax.errors import LockedError, UserError


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
    """Makes a work directory, if need be, and keeps other trainers out of it inside the block.

    The lock is the operating system's on the open file, so that it ends with the process, however
    that ends; what the file says is only for people. A directory that was made for nothing, as the
    run could not begin, is removed.

    Args:
        workdir: path of the directory.

    Raises:
        LockedError: another trainer has it; names that.
        UserError: it is not a directory, cannot be written, or its file system has no locks.
    """
    if not workdir:
        raise UserError("--workdir='': accepted is a directory that can be written")
    directory = Path(workdir)
    path = directory / "lock"
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(workdir, error) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockedError(
                    f"--workdir={workdir}: is in use by {_holder(path)}; accepted is a directory "
                    "in which no other train.py runs"
                ) from None
            raise _unusable(workdir, error) from None
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its text
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            if made and list(directory.iterdir()) == [path]:
                path.unlink()
                for folder in made:
                    folder.rmdir()
        os.close(file)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


def _unusable(workdir: str, error: OSError) -> UserError:
    return UserError(
        f"--workdir={workdir}: {error.strerror}; accepted is a directory that can be written, on a "
        "file system with locks"
    )
