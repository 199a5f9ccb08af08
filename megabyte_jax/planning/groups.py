"""Which devices take part in a collective of a compiled program."""

from __future__ import annotations

import math
import re

import numpy as np


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first group of `replica_groups`, in any of its three spellings; empty for all devices."""
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if match:
        return tuple(map(int, match[1].split(","))) if match[1] else ()
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if match:
        return tuple(_iota(match[3]).reshape(int(match[1]), int(match[2]))[0].tolist())
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\((.*?)\))? *\{([^}]*)\}", attributes
    )
    if not match:
        return ()
    # Axes of a mesh, or factors of one: 'a':(2)4 are 4 of it, after the first 2.
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    ids = _iota(match[2] or str(list(sizes.values()))).reshape(list(sizes.values()))
    index = {name: [0] for name in sizes}
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3]):
        taken, split = (
            (int(part), int(before) * int(part)) if before else (sizes[name], sizes[name])
        )
        index[name] = [i * (sizes[name] // split) for i in range(taken)]
    return tuple(ids[np.ix_(*index.values())].ravel().tolist())


def _iota(text: str) -> np.ndarray:
    """Reads [16,4]T(1,0): 0, 1, ... in that shape, then transposed."""
    shape, _, order = text.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else ids
