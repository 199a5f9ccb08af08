"""Compressed files: gzip, xz and zstd, unpacked one after another into one file."""

import gzip
import lzma
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import zstandard

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import UserError

COMPRESSED = (".gz", ".xz", ".zst")


def unpack(
    paths: Iterable[str], unpacked: IO[bytes], bad: BadRecords
) -> dict[str, tuple[int, int]]:
    """Unpacks files.

    Args:
        paths: whose names end in one of `COMPRESSED`.
        unpacked: a temporary file without a buffer, written from where it stands.
        bad: counts files that are corrupt or hold nothing; what was written of them stays.

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
            for chunk in _decompress(path):
                _write(unpacked, chunk, path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
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
    if path.endswith(".zst"):
        yield from _decompress_zstd(path)
        return
    with (gzip if path.endswith(".gz") else lzma).open(path) as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _decompress_zstd(path: str) -> Iterator[bytes]:
    # zstandard's own reader takes a truncated file for a whole one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as file:
        # 1 KiB of zeros compressed may hold 32 MiB, and comes back whole.
        while chunk := file.read(1 << 10):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("Compressed file ended before the end of its last frame")
