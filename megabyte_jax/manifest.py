"""What a checkpoint holds, with a digest of every piece, and whether a directory holds just that.

A checkpoint is written so that each shard of an array is one file of its plain bytes. One digest,
taken of the array before it is written, then serves for the file, and is checked before anything
else reads it. Digests find accidents; who can write the files can write the manifest too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from megabyte_jax.errors import CheckpointError

_FORMAT = 1
_FILE = "manifest/metadata"
# What Orbax adds to the arrays of an item, and the most bytes it takes: some, and some per array.
_DESCRIPTIONS = {
    "_METADATA",
    "_sharding",
    "array_metadatas/process_*",
    "commit_success.txt",
}
_DESCRIPTION_BYTES, _BYTES_PER_ARRAY = 1 << 20, 1 << 14
_PIECE = 1 << 20  # bytes read at a time; of 1 << 18 to 1 << 22 among the fastest
# Threads that read, one more for as many bytes, as of few they cost more than they bring.
_THREADS, _BYTES_PER_THREAD = 4, 1 << 28


def chunks(items: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each shard that this process writes.

    Args:
        items: name to tree of jax.Array, as they are saved.

    Returns:
        Path of its file in the checkpoint to 128 bits in hex.
    """
    return {
        f"{name}/{'.'.join(map(str, place)) or '0'}": digest(shard.data)
        for name, x in named_arrays(items)
        for shard in x.addressable_shards
        if shard.replica_id == 0
        for place in [_place(shard.index, shard.data.shape)]
    }


def _place(index: Sequence[slice], shape: Sequence[int]) -> list[int]:
    return [(i.start or 0) // n for i, n in zip(index, shape, strict=True)]


def named_arrays(items: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every array of the items, with the path of its directory in a checkpoint."""
    for item, tree in items.items():
        for path, x in jax.tree.leaves_with_path(tree):
            yield f"{item}/{jax.tree_util.keystr(path, simple=True, separator='.')}", x


def digest(x: Any) -> str:
    """128 bits of the bytes of an array, in hex."""
    data = np.ascontiguousarray(x)
    return xxhash.xxh3_128_hexdigest(data.reshape(-1).view(np.uint8).data)


def make(
    items: Mapping[str, Any], digests: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        items: name to tree of arrays, as they are saved.
        digests: of all shards, those of other processes too.
        facts: what else is to be known, of what JSON can hold.
    """
    arrays = {
        name: {
            "dtype": str(x.dtype),
            "shape": list(x.shape),
            "shard": list(x.sharding.shard_shape(x.shape)),
        }
        for name, x in named_arrays(items)
    }
    body = {"format": _FORMAT, **facts, "arrays": arrays, "digests": dict(digests)}
    return {"body": body, "digest": _body_digest(body)}


def _body_digest(body: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def read(checkpoint: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the manifest of a checkpoint, whose directory has to hold what it says and no more.

    Nothing is read whose size `like` does not bound.

    Args:
        checkpoint: its directory.
        like: name to tree of arrays or their shapes and types, which it has to have; items of the
            checkpoint that are not named here may be anything.

    Returns:
        The manifest without its own digest.

    Raises:
        CheckpointError: it is none, is damaged, or holds something else; names what.
    """
    wanted = dict(named_arrays(like))
    bound = _DESCRIPTION_BYTES + _BYTES_PER_ARRAY * len(wanted)
    files = _files(checkpoint)
    if _FILE not in files:
        raise CheckpointError(f"{_FILE} is missing")
    if files[_FILE] > 64 * bound:
        raise CheckpointError(f"{_FILE} has {files[_FILE]} bytes")
    try:
        manifest = json.loads((checkpoint / _FILE).read_bytes())
        body = dict(manifest["body"])
        if manifest["digest"] != _body_digest(body):
            raise CheckpointError(f"{_FILE} is damaged")
        if body["format"] != _FORMAT:
            raise CheckpointError(f"its format is {body['format']!r}; known is {_FORMAT}")
        if body["step"] != int(checkpoint.name):
            raise CheckpointError(f"it is that of update {body['step']}, renamed")
        _require_arrays(body["arrays"], wanted, set(like))
        _require_files(checkpoint, files, body, set(like), bound)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"what describes it is damaged ({type(error).__name__})") from error
    return body


def _files(checkpoint: Path) -> dict[str, int]:
    """Size of each file below a directory that holds nothing else than files and directories."""
    found: dict[str, int] = {}
    left = [checkpoint]
    while left:
        folder = left.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                name = Path(entry.path).relative_to(checkpoint).as_posix()
                if stat.S_ISDIR(status.st_mode):
                    left.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    found[name] = status.st_size
                else:
                    kind = "a symbolic link" if entry.is_symlink() else "no plain file"
                    raise CheckpointError(f"{name} is {kind}")
    return found


def _require_arrays(arrays: Mapping[str, Any], wanted: Mapping[str, Any], items: set[str]) -> None:
    there = {name for name in arrays if name.partition("/")[0] in items}
    for name in sorted(there | wanted.keys()):
        if name not in there:
            raise CheckpointError(f"it lacks {name}, which the config asks for")
        if name not in wanted:
            raise CheckpointError(f"it has {name}, which the config does not know")
        x = wanted[name]
        for what, held, asked in (
            ("shape", arrays[name]["shape"], list(x.shape)),
            ("dtype", arrays[name]["dtype"], str(x.dtype)),
        ):
            if held != asked:
                raise CheckpointError(f"{name} has {what} {held}, the config asks for {asked}")


def _require_files(
    checkpoint: Path, files: Mapping[str, int], body: Mapping[str, Any], items: set[str], bound: int
) -> None:
    """Every shard is there in its size, and besides only descriptions of bounded size."""
    expected: dict[str, int] = {}
    for name, array in body["arrays"].items():
        if name.partition("/")[0] not in items:
            continue
        shape, shard = array["shape"], array["shard"]
        sizes = list(zip(shape, shard, strict=True))
        if any(m < 1 or n % m for n, m in sizes):
            raise CheckpointError(f"{name} has shards of {shard}")
        size = math.prod(shard) * np.dtype(array["dtype"]).itemsize
        grid = [range(n // m) for n, m in sizes]
        for place in itertools.islice(itertools.product(*grid), len(body["digests"]) + 1):
            expected[f"{name}/{'.'.join(map(str, place)) or '0'}"] = size
        _require_layout(checkpoint, f"{name}/.zarray", files, array)
    for name, size in expected.items():
        if files.get(name) != size or name not in body["digests"]:
            held = f"{files[name]} bytes" if name in files else "missing"
            raise CheckpointError(f"{name} is {held}; it had {size} bytes")
    for name, size in files.items():
        item, _, rest = name.partition("/")
        if item not in items or name in expected:
            continue
        known = any(Path(rest).match(pattern) for pattern in _DESCRIPTIONS)
        known |= (
            rest.endswith("/.zarray")
            and f"{item}/{rest.removesuffix('/.zarray')}" in body["arrays"]
        )
        if not known or size > bound:
            raise CheckpointError(f"{name}, of {size} bytes, does not belong there")


def _require_layout(
    checkpoint: Path, name: str, files: Mapping[str, int], array: Mapping[str, Any]
) -> None:
    if name not in files or not files[name] < _BYTES_PER_ARRAY:
        held = f"{files[name]} bytes" if name in files else "missing"
        raise CheckpointError(f"{name} is {held}")
    held = json.loads((checkpoint / name).read_bytes())
    dtype = np.dtype(array["dtype"])
    asked = {
        "chunks": array["shard"],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": held["dtype"] if held["dtype"] in (dtype.str, dtype.name) else dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": array["shape"],
        "zarr_format": 2,
    }
    if held != asked:
        raise CheckpointError(f"{name} is damaged")


def verify(checkpoint: Path, digests: Mapping[str, str]) -> None:
    """Compares the files of a checkpoint with the digests of what was to be written.

    Args:
        checkpoint: its directory.
        digests: as `chunks` gives them, of all or some of the shards.

    Raises:
        CheckpointError: a file differs; names it.
    """
    paths = {name: os.path.join(checkpoint, name) for name in digests}
    size = sum(map(os.path.getsize, paths.values()))
    threads = min(_THREADS, 1 + size // _BYTES_PER_THREAD)

    def read(thread: int) -> None:
        buffer = memoryview(bytearray(_PIECE))
        for name, path in itertools.islice(paths.items(), thread, None, threads):
            found = xxhash.xxh3_128()
            file = os.open(path, os.O_RDONLY)  # open() takes as long as a small file
            try:
                while count := os.readv(file, [buffer]):
                    found.update(buffer[:count])
            finally:
                os.close(file)
            if found.hexdigest() != digests[name]:
                raise CheckpointError(f"{name} is damaged: its digest is not the manifest's")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
