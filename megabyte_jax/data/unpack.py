"""Compressed files: gzip, xz and zstd, unpacked one after another into one file."""

import functools
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import zstandard

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import UserError

COMPRESSED = (".gz", ".xz", ".zst")

# A file of zeros is a few thousand times smaller compressed; nobody trains on one.
_MAX_RATIO = 200
_ALWAYS = 2**30  # bytes that any file may hold
_XZ_MEMORY = 2**28  # bytes; xz -9 asks for 65 MiB, a header can for 4 GiB


def unpack(
    paths: Iterable[str], unpacked: IO[bytes], bad: BadRecords
) -> dict[str, tuple[int, int]]:
    """Unpacks files.

    Args:
        paths: whose names end in one of `COMPRESSED`.
        unpacked: a temporary file without a buffer, written from where it stands.
        bad: counts files that are corrupt, hold nothing or too much for their size.

    Returns:
        Path to where its contents begin and end in `unpacked`, in bytes.

    Raises:
        UserError: there is no space left.
        DataError: more files cannot be used than `bad` accepts.
    """
    spans = {}
    for path in paths:
        start = unpacked.tell()
        try:
            limit = start + max(_ALWAYS, _MAX_RATIO * os.path.getsize(path))
            for chunk in _decompress(path):
                if unpacked.tell() + len(chunk) > limit:
                    raise OSError(f"holds more than {_MAX_RATIO} times its size")
                _write(unpacked, chunk, path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            unpacked.seek(start)
            unpacked.truncate()
            bad.add(f"{path}: cannot be unpacked ({error})")
            continue
        if unpacked.tell() == start:
            bad.add(f"{path}: holds no byte")
        else:
            spans[path] = start, unpacked.tell()
    return spans


def _write(unpacked: IO[bytes], chunk: bytes, path: str) -> None:
    left = memoryview(chunk)
    try:
        while left:
            left = left[unpacked.write(left) :]
    except OSError as error:
        raise UserError(
            f"TMPDIR={tempfile.gettempdir()}: {error.strerror} while unpacking {path}; accepted is "
            "a folder with space"
        ) from error


def _decompress(path: str) -> Iterator[bytes]:
    if path.endswith(".gz"):
        with gzip.open(path) as file:
            while chunk := file.read(1 << 20):
                yield chunk
    elif path.endswith(".xz"):
        new = functools.partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY)
        yield from _decompress_frames(path, new, padding=b"\0")
    else:
        yield from _decompress_frames(path, lambda: zstandard.ZstdDecompressor().decompressobj())


def _decompress_frames(path: str, new: Callable[[], Any], padding: bytes = b"") -> Iterator[bytes]:
    # zstandard's own reader takes a truncated file for a whole one, and that of lzma has no limit.
    frame = new()
    with open(path, "rb") as file:
        # 1 KiB of zeros compressed may hold 32 MiB, and comes back whole.
        while chunk := file.read(1 << 10):
            while chunk := chunk.lstrip(padding) if frame.eof else chunk:
                frame = new() if frame.eof else frame
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("Compressed file ended before the end of its last frame")
