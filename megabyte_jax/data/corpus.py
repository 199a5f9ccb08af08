"""Where documents come from: files, folders, globs, compressed files, the standard library."""

import gzip
import lzma
import mmap
import os
import platform
import stat
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import zstandard
from numpy.typing import NDArray

from megabyte_jax.errors import UserError

_COMPRESSED = (".gz", ".xz", ".zst")

# Distributions leave out, or package apart, the tests and everything else named here: without them
# the corpus is the same wherever the same Python runs.
_NOT_EVERYWHERE = frozenset(
    "site-packages dist-packages __pycache__ test tests idle_test "
    "distutils ensurepip idlelib lib2to3 tkinter turtledemo".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A run of bytes with a name.

    Attributes:
        name: Path relative to the source, with forward slashes and no compression suffix.
        source: The file that holds the bytes, or an array uint8[N] that does.
        start: Where the document begins in the source, in bytes.
        stop: Where it ends.
    """

    name: str
    source: str | NDArray[np.uint8]
    start: int
    stop: int

    def __len__(self) -> int:
        """Returns the number of bytes."""
        return self.stop - self.start

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes, uint8[N], read-only.

        A file is mapped anew at each access and unmapped with the last view of it, so that a corpus
        of any number of files holds none of them open.

        Raises:
            UserError: The file was removed or has shrunk since the corpus was opened.
        """
        if not isinstance(self.source, str):
            return self.source[self.start : self.stop]
        try:
            with open(self.source, "rb") as file:
                return _map(file, self.stop)[self.start :]
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.source: {self.source!r} changed while in use ({error}); "
                f"accepted: a file that keeps its {self.stop} bytes"
            ) from error


@dataclass(frozen=True, eq=False)
class Corpus:
    """An ordered list of documents.

    Attributes:
        name: What a report shows.
        documents: The documents, sorted by name.
    """

    name: str
    documents: tuple[Document, ...]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        """Iterates over the documents in order."""
        return iter(self.documents)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document begins in their concatenation, then its end: int64[documents + 1]."""
        return np.cumsum([0, *map(len, self.documents)], dtype=np.int64)

    @property
    def num_bytes(self) -> int:
        """The bytes of all documents together."""
        return int(self.offsets[-1])


def open_corpus(source: str, *, option: str = "data.source") -> Corpus:
    """Opens the documents that a source names, without reading the uncompressed ones.

    Files .gz, .xz and .zst are decompressed now, into one unnamed file in the folder for temporary
    files (see `tempfile.gettempdir`; TMPDIR moves it), which goes away with the corpus.
    A folder is searched with its sub-folders; hidden files and linked folders are left out.

    Args:
        source: `stdlib` (the source code of this Python's standard library), a file, a folder or a
            glob, in which `**` stands for any folders.
        option: What the user calls `source`, for the error.

    Raises:
        UserError: The source is missing, empty, unreadable, not made of regular files, or corrupt.
    """
    try:
        if source == "stdlib":
            name = f"stdlib-{platform.python_version()}"
            root, paths = _find_stdlib()
        else:
            name = source
            root, paths = _find(os.path.expanduser(source))
        documents = _open_documents(root, paths)
        if not any(map(len, documents)):
            raise ValueError(f"holds no byte ({len(documents)} files found)")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}={source!r}: {error}; accepted: stdlib, or a file, a folder or a glob of "
            "readable files that are not all empty"
        ) from error
    return Corpus(name, documents)


def _find_stdlib() -> tuple[str, list[str]]:
    root = sysconfig.get_path("stdlib")
    paths = []
    for path in _walk(root, skip=_NOT_EVERYWHERE):
        top = os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py")
        # The build's own settings and sitecustomize.py differ between machines and are no module.
        if path.endswith(".py") and top in sys.stdlib_module_names:
            paths.append(path)
    return root, paths


def _find(path: str) -> tuple[str, list[str]]:
    """Returns the folder that names are relative to, and the paths of the files."""
    if os.path.isdir(path):
        return path, list(_walk(path))
    if os.path.lexists(path) or not any(letter in path for letter in "*?["):
        return os.path.dirname(path), [path]
    parts = Path(path).parts
    fixed = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    root = Path(*parts[:fixed])
    # Before Python 3.13 a last `**` matches folders only. Unlike glob.glob, Path.glob does not
    # follow linked folders, which may be loops.
    pattern = os.path.join(*parts[fixed:], *(["*"] if parts[-1] == "**" else []))
    matches = {match for match in root.glob(pattern) if not match.is_dir()}
    return str(root), [str(match) for match in matches if not _is_hidden(match.relative_to(root))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _walk(root: str, skip: Collection[str] = ()) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "." and name not in skip]
        yield from (os.path.join(folder, name) for name in files if name[0] != ".")


def _open_documents(root: str, paths: Iterable[str]) -> tuple[Document, ...]:
    plain, packed = {}, {}
    for path in paths:
        name = os.path.relpath(path, root or ".").replace(os.sep, "/")
        stem, suffix = os.path.splitext(name)
        if suffix in _COMPRESSED:
            packed[path] = stem
        else:
            plain[path] = name
    documents = [Document(name, path, 0, _file_size(path)) for path, name in plain.items()]
    if packed:
        documents += _unpack(packed)
    documents.sort(key=lambda document: document.name)
    for before, after in pairwise(documents):
        if before.name == after.name:
            raise ValueError(f"{after.name!r} is there twice, compressed and not")
    return tuple(documents)


def _file_size(path: str) -> int:
    """Returns the size in bytes of a file that can be read."""
    status = os.stat(path)
    # Before opening it: to open a FIFO is to wait for a writer.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path!r} is not a regular file")
    with open(path, "rb"):
        return status.st_size


def _map(file: IO[bytes], size: int) -> NDArray[np.uint8]:
    if size == 0:  # The operating system maps nothing of no length.
        return np.frombuffer(b"", np.uint8)
    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    # Windows lie anywhere: reading ahead of each would fetch up to megabytes for a few kilobytes.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)


def _unpack(names: dict[str, str]) -> list[Document]:
    """Decompresses files, given as path to name, one after the other into an unlinked file."""
    ends = [0]
    with tempfile.TemporaryFile() as unpacked:
        for path in names:
            _file_size(path)
            try:
                for chunk in _decompress(path):
                    unpacked.write(chunk)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                folder = tempfile.gettempdir()
                raise ValueError(f"cannot unpack {path!r} into {folder!r}: {error}") from error
            ends.append(unpacked.tell())
        unpacked.flush()
        data = _map(unpacked, ends[-1])
    return [
        Document(name, data, start, stop)
        for name, start, stop in zip(names.values(), ends[:-1], ends[1:], strict=True)
    ]


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
