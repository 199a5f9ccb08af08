"""Files that may come from anyone: a work directory, a data set. Nothing of them is code."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from megabyte_jax.errors import UserError


def check_file(path: Path, directory: Path) -> int:
    """Returns the size of a file in bytes, which is not opened: a FIFO would wait for a writer.

    Raises:
        OSError: it is missing, no regular file, or links lead out of the directory.
    """
    try:
        status = os.stat(path)
        outside = not path.resolve().is_relative_to(directory.resolve())
    except (RuntimeError, ValueError) as error:  # a loop of links before Python 3.13; a NUL
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    if outside:
        raise OSError(errno.EINVAL, f"lies outside of {directory}")
    return status.st_size


def read_json(path: Path, directory: Path, max_bytes: int) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        OSError: see `check_file`.
        ValueError: it is larger than `max_bytes`, or no JSON object.
    """
    if (size := check_file(path, directory)) > max_bytes:
        raise ValueError(f"{size} bytes, where {max_bytes} are accepted")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested beyond reason") from None
    if not isinstance(content, dict):
        raise ValueError("no object")
    return content


def require_inside(directory: Path, path: Path) -> None:
    """Refuses to write through links that lead out of a directory.

    Raises:
        UserError: the path is not below the directory.
    """
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
    except RuntimeError:
        inside = False
    if not inside:
        raise UserError(
            f"{path}: links lead out of {directory}; accepted is a directory without such links"
        )
