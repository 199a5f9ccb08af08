"""The flat layout: documents one after another in a file, and where each begins in another.

    DIR/data.bin       the bytes of all documents
    DIR/offsets.npy    int64[documents + 1], where each begins in it, then the end
    DIR/manifest.json  what it was made from, and the SHA-256 of the other two

Decoding an image or a record costs far more than reading its bytes, so both are done once. Neither
file is ever read whole: a corpus of any size costs no memory.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megabyte_jax import foreign
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.data.scratch import scratch_directory
from megabyte_jax.errors import DataError, UserError

_FORMAT = 1
_MAX_HEADER = 1 << 12  # bytes that NumPy writes before an array
_MAX_MANIFEST = 1 << 26  # bytes; the key lists the shards of a TFDS set
_BYTES, _OFFSETS, _MANIFEST = "data.bin", "offsets.npy", "manifest.json"


@dataclass(frozen=True, eq=False)
class _Documents(Sequence[Document]):
    """Documents that are made when asked for: there may be tens of millions."""

    source: str
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...
    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        if isinstance(index, slice):
            return tuple(map(self.__getitem__, range(*index.indices(len(self)))))
        number = range(len(self))[index]
        start, stop = self.offsets[number : number + 2].tolist()
        return Document(str(number), self.source, start, stop)


@dataclass(frozen=True, eq=False)
class FlatCorpus(Corpus):
    """A corpus in the flat layout; a document is named by its number.

    Attributes:
        manifest: Fields of manifest.json: key, documents, bytes, bad_records, first_bad_record, and
            the SHA-256 of either file.
    """

    documents: _Documents
    manifest: Mapping[str, Any] = field(kw_only=True)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document begins in their concatenation, then its end: int64[documents + 1]."""
        return self.documents.offsets

    @property
    def fingerprint(self) -> str:
        """Tells corpora apart: the SHA-256 of all bytes that the manifest has."""
        return str(self.manifest["sha256"][_BYTES])

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fills `out`, uint8[N], with the N bytes from `start` on of the concatenated documents.

        Raises:
            DataError: The layout was removed or has shrunk since it was opened.
        """
        # As they lie in the file: however short they are, they are read at once.
        Document(self.name, self.documents.source, 0, self.num_bytes).read(start, out)

    def verify(self) -> None:
        """Reads all bytes and compares them with the SHA-256 of the manifest.

        Raises:
            DataError: They were changed since the layout was written.
        """
        source = Path(self.documents.source)
        if _sha256(source) != self.manifest["sha256"][_BYTES]:
            raise _damaged(source.parent, f"{_BYTES} has another SHA-256")


def flatten(
    cache_dir: str, name: str, key: Mapping[str, Any], contents: Iterable[bytes], bad: BadRecords
) -> FlatCorpus:
    """Opens the flat layout of a key, written first if it is not there.

    Args:
        cache_dir: where layouts are kept; "" is megabyte_jax in XDG_CACHE_HOME or ~/.cache.
        name: what a report shows.
        key: all that decides the contents, as JSON has it.
        contents: the documents, taken only to be written.
        bad: counts what is left out of them, or was when they were written.

    Raises:
        DataError: too much is left out, nothing is left to write, or the layout is damaged.
        UserError: `cache_dir` cannot be written.
    """
    root = Path(cache_dir).expanduser() if cache_dir else _default_cache()
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name)[:80].strip("-")
    directory = root / f"{slug}-{digest[:32]}"
    if directory.exists():
        corpus = _open(directory, name)
        if corpus.bad_records:
            bad.add(corpus.manifest["first_bad_record"], corpus.bad_records)
        return corpus
    try:
        # What is planted here is trained on later.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with scratch_directory(root) as part:
            _write(part / "whole", key, contents, bad)
            try:
                (part / "whole").rename(directory)
            except OSError:
                if not directory.exists():  # else another process wrote the same meanwhile
                    raise
    except OSError as error:
        raise UserError(
            f"data.cache_dir={str(root)!r}: {error.strerror or error}; accepted is a directory "
            "that can be written and has space"
        ) from error
    return _open(directory, name)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megabyte_jax"


def _write(
    directory: Path, key: Mapping[str, Any], contents: Iterable[bytes], bad: BadRecords
) -> None:
    directory.mkdir()
    before = bad.count
    sizes, digest = array("q", [0]), hashlib.sha256()
    with open(directory / _BYTES, "wb") as file:
        for document in contents:
            file.write(document)
            digest.update(document)
            sizes.append(len(document))
    offsets = np.cumsum(sizes, dtype=np.int64)
    if not offsets[-1]:
        raise DataError(f"no record is left; {bad.count} were left out, the first: {bad.first}")
    np.save(directory / _OFFSETS, offsets)
    manifest = {
        "key": key,
        "documents": len(offsets) - 1,
        "bytes": int(offsets[-1]),
        "bad_records": bad.count - before,
        "first_bad_record": bad.first if bad.count > before else None,
        "sha256": {_BYTES: digest.hexdigest(), _OFFSETS: _sha256(directory / _OFFSETS)},
    }
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _open(directory: Path, name: str) -> FlatCorpus:
    try:
        manifest = foreign.read_json(directory / _MANIFEST, directory, _MAX_MANIFEST)
        foreign.check_file(directory / _BYTES, directory)
        size = foreign.check_file(directory / _OFFSETS, directory)
        if size - 8 * (manifest["documents"] + 1) not in range(_MAX_HEADER):
            raise ValueError(f"{_OFFSETS} has {size} bytes")
        if _sha256(directory / _OFFSETS) != manifest["sha256"][_OFFSETS]:
            raise ValueError(f"{_OFFSETS} has another SHA-256")
        offsets = np.lib.format.open_memmap(directory / _OFFSETS, mode="r")
        if offsets.shape != (manifest["documents"] + 1,) or offsets[-1] != manifest["bytes"]:
            raise ValueError(f"{_OFFSETS} does not fit {_MANIFEST}")
        if offsets.dtype != np.int64 or offsets[0] or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"{_OFFSETS} does not hold where documents begin")
        if (directory / _BYTES).stat().st_size != manifest["bytes"]:
            raise ValueError(f"{_BYTES} has not the size that {_MANIFEST} says")
        bad_records, _ = int(manifest["bad_records"]), manifest["first_bad_record"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(directory, error) from error
    documents = _Documents(str(directory / _BYTES), offsets)
    return FlatCorpus(name, documents, bad_records, manifest=manifest)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(directory: Path, reason: object) -> DataError:
    return DataError(f"{directory}: damaged ({reason}); remove it, and it is made again")
