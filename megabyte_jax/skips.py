"""Which batches a run leaves out: those of `train.skip` and those that it went back over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megabyte_jax import files
from megabyte_jax.errors import UserError

Ranges = tuple[tuple[int, int], ...]  # of batches, [first, stop), apart and in order
_FILE = "skipped.json"


def union(ranges: Iterable[Iterable[int]]) -> Ranges:
    """Ranges of batches that hold those of all the ranges given, in any order."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted((first, stop) for first, stop in ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((first, stop))
    return tuple(merged)


def before(ranges: Ranges, step: int) -> Ranges:
    """The part of the ranges that the first `step` updates left out."""
    return tuple((first, min(stop, step)) for first, stop in ranges if first < step)


def contain(ranges: Ranges, batch: int) -> bool:
    """Whether a batch is left out."""
    return any(first <= batch < stop for first, stop in ranges)


def read(workdir: Path) -> list[tuple[int, int]]:
    """The ranges that a run went back over, in the order in which it did.

    Raises:
        UserError: the file of them is damaged; without it the run would be another one.
    """
    path = workdir / _FILE
    if not path.exists():
        return []
    try:
        return [(int(first), int(stop)) for first, stop in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--workdir={workdir}: {_FILE} cannot be read ({error}); accepted is a list of "
            "[first, stop] of batches, as the run wrote it"
        ) from None


def add(workdir: Path, first: int, stop: int) -> None:
    """Keeps one more range, whole or not at all."""
    kept = [*read(workdir), (first, stop)]
    files.replace(workdir / _FILE, json.dumps(kept).encode())
