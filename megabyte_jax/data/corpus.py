"""Where documents come from: files, folders, globs, compressed files, the standard library."""

import hashlib
import mmap
import os
import platform
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.find import find_files, find_stdlib
from megabyte_jax.data.unpack import COMPRESSED, unpack
from megabyte_jax.errors import DataError, UserError


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
            DataError: The file was removed or has shrunk since the corpus was opened.
        """
        if not isinstance(self.source, str):
            return self.source[self.start : self.stop]
        try:
            with open(self.source, "rb") as file:
                return _map(file, self.stop)[self.start :]
        except (OSError, ValueError) as error:
            raise self._changed(error) from error

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fills `out`, uint8[N], with the N bytes from `start` on, and keeps no file open.

        Raises:
            DataError: The file was removed or has shrunk since the corpus was opened.
        """
        if not isinstance(self.source, str):
            out[:] = self.source[self.start + start : self.start + start + len(out)]
            return
        try:
            with open(self.source, "rb", buffering=0) as file:
                _expect_random_reads(file)
                file.seek(self.start + start)
                left = out.data
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise EOFError("shorter than it was")
                    left = left[count:]
        except (OSError, EOFError) as error:
            raise self._changed(error) from error

    def _changed(self, error: Exception) -> DataError:
        return DataError(
            f"{self.source}: changed while in use ({error}); accepted is a file that keeps its "
            f"{self.stop} bytes"
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """An ordered list of documents.

    Attributes:
        name: What a report shows.
        documents: The documents; those of a folder are sorted by name.
        bad_records: How many were left out of the source.
    """

    name: str
    documents: Sequence[Document]
    bad_records: int = 0

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

    @property
    def fingerprint(self) -> str:
        """Tells corpora apart: a SHA-256, here of names and sizes, not of the bytes themselves."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.name!a} {len(document)}\n".encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Does nothing: of plain files nothing is known to compare them with."""

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fills `out`, uint8[N], with the N bytes from `start` on of the concatenated documents.

        Raises:
            DataError: A file was removed or has shrunk since the corpus was opened.
        """
        # The last document that begins here or before: never an empty one.
        number = int(np.searchsorted(self.offsets, start, side="right")) - 1
        place = start - int(self.offsets[number])
        while len(out):
            document = self.documents[number]
            piece = out[: len(document) - place]
            document.read(place, piece)
            out, number, place = out[len(piece) :], number + 1, 0


def open_corpus(
    source: str, *, bad: BadRecords | None = None, option: str = "data.source"
) -> Corpus:
    """Opens the documents that a source names, without reading the uncompressed ones.

    Files .gz, .xz and .zst are decompressed now, into one unnamed file in the folder for temporary
    files (see `tempfile.gettempdir`; TMPDIR moves it), which goes away with the corpus.
    A folder is searched with its sub-folders; hidden files and linked folders are left out.

    Args:
        source: `stdlib` (the source code of this Python's standard library), a file, a folder or a
            glob, in which `**` stands for any folders.
        bad: Counts files that are empty, unreadable, corrupt or not regular; None accepts none.
        option: What the user calls `source`, for the error.

    Raises:
        UserError: The source names no file.
        DataError: More files cannot be used than `bad` accepts, or two have one name.
    """
    bad = bad or BadRecords(0)
    try:
        if source == "stdlib":
            name = f"stdlib-{platform.python_version()}"
            root, paths = find_stdlib()
        else:
            name = source
            root, paths = find_files(os.path.expanduser(source), bad)
    except (OSError, ValueError) as error:
        raise _no_source(option, source, error) from error
    if not paths:
        raise _no_source(option, source, "no file found")
    documents = _open_documents(root, paths, bad)
    if not documents:
        raise DataError(f"{option}={source!r}: all of its {len(paths)} files were left out")
    return Corpus(name, documents, bad.count)


def _no_source(option: str, source: str, reason: object) -> UserError:
    return UserError(
        f"{option}={source!r}: {reason}; accepted: stdlib, tfds:NAME, or a file, a folder or a "
        "glob that is there"
    )


def _open_documents(root: str, paths: Iterable[str], bad: BadRecords) -> tuple[Document, ...]:
    documents, packed = [], {}
    for path in sorted(paths):
        name = os.path.relpath(path, root or ".").replace(os.sep, "/")
        stem, suffix = os.path.splitext(name)
        try:
            size = _file_size(path)
        except (OSError, ValueError) as error:
            bad.add(f"{path}: {getattr(error, 'strerror', None) or error}")
            continue
        if suffix in COMPRESSED:
            packed[path] = stem
        else:
            documents.append(Document(name, path, 0, size))
    if packed:
        documents += _unpack(packed, bad)
    documents.sort(key=lambda document: document.name)
    for before, after in pairwise(documents):
        if before.name == after.name:
            raise DataError(f"{os.path.join(root, after.name)}: is there twice, compressed and not")
    return tuple(documents)


def _file_size(path: str) -> int:
    """Returns the size in bytes of a file that can be read and holds any."""
    status = os.stat(path)
    # Before opening it: to open a FIFO is to wait for a writer.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if not status.st_size:
        raise ValueError("holds no byte")
    with open(path, "rb"):
        return status.st_size


def _map(file: IO[bytes], size: int) -> NDArray[np.uint8]:
    if size == 0:  # The operating system maps nothing of no length.
        return np.frombuffer(b"", np.uint8)
    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    # Windows lie anywhere: reading ahead of each would fetch up to megabytes for a few kilobytes.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)


def _expect_random_reads(file: IO[bytes]) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


def _unpack(names: dict[str, str], bad: BadRecords) -> list[Document]:
    """Unpacks files, given as path to name, into an unlinked file."""
    with tempfile.TemporaryFile(buffering=0) as unpacked:
        spans = unpack(names, unpacked, bad)
        data = _map(unpacked, unpacked.tell())
    return [Document(names[path], data, start, stop) for path, (start, stop) in spans.items()]
