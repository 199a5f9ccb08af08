"""TFDS builders for local files, for what TFDS's catalogue has not; they need no TensorFlow.

    DIR/{byte,image,audio}_files/NAME/1.0.0/  shards in ArrayRecord, TFDS's own JSON files, and
        provenance.json                       what they were made from, and checksums

An example has the document's name and its data: bytes, an image as uint8[H, W, 3], or samples as
int16[N]. Examples stand in the order of the source.
"""

import abc
import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray

from megabyte_jax.data import audio, images, media
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.data.scratch import scratch_directory
from megabyte_jax.data.tfds_sets import PROVENANCE, add_to_digest, find_root, parse
from megabyte_jax.data.windows import prefetch
from megabyte_jax.errors import DataError, UserError

_Splits = dict[str, Iterator[tuple[int, dict[str, Any]]]]


def _configs(**descriptions: str) -> list[Any]:
    return [tfds.core.BuilderConfig(name=name, description=d) for name, d in descriptions.items()]


class _LocalFiles(tfds.core.GeneratorBasedBuilder):
    """Writes the examples that `prepare` makes."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data: Any = None, examples: _Splits | None = None, **kwargs: Any) -> None:
        """Takes the config's data and the examples of each split, by TFDS's own arguments."""
        self._settings, self._examples = data, examples
        super().__init__(**kwargs)

    @abc.abstractmethod
    def _feature(self) -> Any:
        """Returns what TFDS stores the data as."""

    def _info(self) -> Any:
        features = {"name": tfds.features.Text(), "data": self._feature()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> _Splits:
        if self._examples is None:
            raise DataError(f"{self.name}: accepted is `python -m megabyte_jax.data prepare`")
        return self._examples

    def _generate_examples(self) -> Any:
        raise NotImplementedError  # TFDS wants the method, and calls it nowhere


class ByteFiles(_LocalFiles):
    """Documents of bytes, one per file."""

    # Paper, section 5: bytes in all, and on average per document.
    BUILDER_CONFIGS = _configs(
        pg19="Books of Project Gutenberg before 1919: 10.1 GB, 411,404 bytes per document.",
        stories="Stories, a subset of Common Crawl: 21.3 GB, 35,265 bytes per document.",
        books="Books of a collection of text: 79.7 GB, 509,526 bytes per document.",
        arxiv="LaTeX of arXiv papers: 91.5 GB, 58,518 bytes per document.",
        code="Code of permissive licences: 353.7 GB, 7,461 bytes per document.",
    )

    def _feature(self) -> Any:
        return tfds.features.Text()


class ImageFiles(_LocalFiles):
    """Images of one size, one per PNG or JPEG file."""

    BUILDER_CONFIGS = _configs(
        imagenet64="ImageNet at 64 x 64 pixels: 12,288 bytes per image.",
        imagenet256="ImageNet at 256 x 256 pixels: 196,608 bytes per image.",
        imagenet640="ImageNet at 640 x 640 pixels: 1,228,800 bytes per image.",
    )

    def _feature(self) -> Any:
        shape = (None, None, 3)
        if self._settings:
            shape = (self._settings.image.height, self._settings.image.width, 3)
        return tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")


class AudioFiles(_LocalFiles):
    """Sound in one channel, one recording per WAV or FLAC file."""

    BUILDER_CONFIGS = _configs(audio="Speech, 16,000 samples of 16 bits per second.")

    def _feature(self) -> Any:
        return tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")


_BUILDERS = {"bytes": ByteFiles, "image": ImageFiles, "audio": AudioFiles}


def prepare(
    name: str, data: Any, splits: Mapping[str, Corpus], data_dir: str, bad: BadRecords
) -> Path:
    """Writes a TFDS set of local files, all of it or nothing.

    Args:
        name: of the set; it becomes the config of the builder for the modality.
        data: the config's, validated: the modality decides the builder.
        splits: the documents of train, validation and test; a split without any is left out.
        data_dir: where sets lie; see `tfds_sets.open_set`.
        bad: counts documents that are damaged or empty.

    Returns:
        The directory of the set, which `tfds_sets.open_set` finds by its name.

    Raises:
        UserError: the set is there already, has no name that TFDS takes, or cannot be written.
        DataError: more documents are damaged than `bad` accepts, or none is left of a split.
    """
    builder_class = _BUILDERS[data.modality]
    version = str(builder_class.VERSION)
    _, config, _ = parse(f"tfds:{builder_class.name}/{name}:{version}", "NAME")
    root = find_root(data_dir)
    directory = root / builder_class.name / name / version
    if directory.exists():
        raise UserError(f"{directory}: is there already; accepted is another name, or removing it")
    try:
        with scratch_directory(root) as part:
            written = _write(builder_class, name, data, splits, part, bad)
            directory.parent.mkdir(parents=True, exist_ok=True)
            written.rename(directory)
    except (OSError, RuntimeError) as error:  # the latter is how array_record says it cannot write
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.tfds.data_dir={str(root)!r}: {reason}; accepted is a directory that can be "
            "written, has space, and has no such set yet"
        ) from error
    return directory


def _write(
    builder_class: Any,
    name: str,
    data: Any,
    splits: Mapping[str, Corpus],
    part: Path,
    bad: BadRecords,
) -> Path:
    """Returns the directory of the set below `part`, provenance and all."""
    noted: dict[str, Any] = {split: {} for split, corpus in splits.items() if len(corpus)}
    examples = {split: _examples(splits[split], data, noted[split], bad) for split in noted}
    known = any(config.name == name for config in builder_class.BUILDER_CONFIGS)
    builder = builder_class(
        data=data,
        examples=examples,
        data_dir=str(part),
        config=name if known else tfds.core.BuilderConfig(name=name),
        file_format="array_record",
    )
    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints where it writes
        builder.download_and_prepare()
    for split, info in builder.info.splits.items():
        noted[split]["shards"] = {path.name: _checksum(path) for path in info.filepaths}
    provenance = {
        "source": data.source,
        "program": f"megabyte_jax {importlib.metadata.version('megabyte-jax')}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": data.to_dict(),
        "splits": noted,
        "bad_records": bad.count,
    }
    directory = Path(builder.data_dir)
    (directory / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return directory


def _examples(
    corpus: Corpus, data: Any, noted: dict[str, Any], bad: BadRecords
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the examples of a split, and notes their number, bytes and SHA-256 in the end."""

    def decode(document: Document) -> bytes | NDArray[Any] | DataError:
        try:
            return _decode(document, data)
        except DataError as error:  # returned, because the thread that asks for it counts it
            return error

    digest, count, num_bytes = hashlib.sha256(), 0, 0
    decoded = prefetch(decode, corpus, os.cpu_count() or 1)
    for document, contents in zip(corpus, decoded, strict=True):
        if isinstance(contents, DataError):
            bad.add(contents)
            continue
        add_to_digest(digest, contents)
        num_bytes += len(contents) if isinstance(contents, bytes) else contents.nbytes
        yield count, {"name": os.fsencode(document.name), "data": contents}
        count += 1
    if not count:
        raise DataError(f"no document is left of {len(corpus)}: {bad.first}")
    noted.update(documents=count, bytes=num_bytes, sha256=digest.hexdigest())


def _decode(document: Document, data: Any) -> bytes | NDArray[Any]:
    contents = document.data.tobytes()
    name = document.source if isinstance(document.source, str) else document.name
    match data.modality:
        case "image":
            return images.decode(
                contents, name, data.image.height, data.image.width, data.image.resize
            )
        case "audio":
            return np.frombuffer(audio.decode(contents, name, data.audio.sample_rate), np.int16)
    return media.from_file(contents, name, data, patch_size=1)


def _checksum(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": digest}
