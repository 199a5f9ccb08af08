"""Data sets of TensorFlow Datasets by name, `tfds:NAME[/CONFIG][:VERSION]`, without TensorFlow.

A prepared set is read from its files alone. Neither a builder nor other code of TFDS gets to see
its directory, which may come from anyone; see `tfds_features`.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megabyte_jax.data import tfds_catalogue
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.tfds_features import (
    MALFORMED,
    Feature,
    check_file,
    choose,
    read_features,
    read_json,
)
from megabyte_jax.data.tfrecord import READERS, read_shard
from megabyte_jax.errors import DataError, EmptySplitError, UserError

PROVENANCE = "provenance.json"  # that `builders.prepare` writes beside the shards

_SOURCE = re.compile(r"tfds:([a-z]\w*)(?:/(\w[\w.+-]*))?(?::(\d+\.\d+\.\d+))?", re.ASCII)
_WORD = re.compile(r"\w[\w.+-]*", re.ASCII)
_VERSION = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}", re.ASCII)
# TFDS formats it as it stands, and a format can ask for an attribute, or for a terabyte of blanks.
_TEMPLATE = re.compile(
    r"(?:[\w./-]|\{(?:DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})*", re.ASCII
)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A set that lies on disk.

    Attributes:
        name: tfds:NAME[/CONFIG]:VERSION.
        directory: that holds its files.
        file_format: of its shards, array_record or tfrecord.
        features: those that can hold data.
        split_infos: TFDS's own index of the splits, which knows its language of slices.
        sizes: of the shards in bytes, of a set that `builders.prepare` wrote; else none.
        digests: SHA-256 of the splits of such a set; see `add_to_digest`.
    """

    name: str
    directory: Path
    file_format: str
    features: list[Feature]
    split_infos: Any
    sizes: dict[str, int]
    digests: dict[str, str]

    @property
    def splits(self) -> dict[str, int]:
        """The number of examples of each split."""
        return {name: info.num_examples for name, info in self.split_infos.items()}


def is_tfds(source: str) -> bool:
    """Returns whether a source is one of TFDS."""
    return source.startswith("tfds:")


def parse(source: str, option: str = "data.source") -> tuple[str, str | None, str | None]:
    """Returns the name, the config and the version, the last two None if they are not named.

    Raises:
        UserError: the source has another form.
    """
    match = _SOURCE.fullmatch(source)
    if not match:
        raise UserError(
            f"{option}={source!r}: accepted is tfds:NAME, tfds:NAME/CONFIG or either with a "
            ":VERSION, such as tfds:downsampled_imagenet/64x64:2.0.0"
        )
    name, config, version = match.groups()
    return name, config, version


def open_set(
    source: str, data_dir: str, *, option: str = "data.source", download: bool = True
) -> Prepared:
    """Opens a set; one of TFDS's catalogue that lies nowhere is downloaded and prepared.

    Args:
        source: tfds:NAME[/CONFIG][:VERSION]; the default is TFDS's own config and the newest
            version there is.
        data_dir: where sets lie; "" is TFDS_DATA_DIR or ~/tensorflow_datasets.
        option: what the user calls `source`, for the error.
        download: whether it may be.

    Raises:
        UserError: TFDS knows no such set.
        DataError: it is damaged, is not to be trusted, or cannot be prepared here.
    """
    name, config, version = parse(source, option)
    root = find_root(data_dir)
    try:
        directory = _find(root, name, config, version)
        if directory is None and config is None and download:
            config = tfds_catalogue.default_config(name, source, root, option)
            directory = _find(root, name, config, version)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; accepted is a directory") from error
    if directory is None and not download:
        raise DataError(
            f"{option}={source!r}: not found in {root}; accepted is a set that lies there, as "
            f"`python -m megabyte_jax.data {source}` prepares one"
        )
    if directory is None:
        directory = tfds_catalogue.prepare(name, config, version, source, root, option)
    return _read(directory, root)


def find_root(data_dir: str) -> Path:
    """Returns the directory that sets lie in; see `open_set`.

    Raises:
        UserError: it is not on this machine.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in chosen:
        raise UserError(f"data.tfds.data_dir={chosen!r}: accepted is a local directory")
    return Path(chosen).expanduser()


def _find(root: Path, name: str, config: str | None, version: str | None) -> Path | None:
    """Returns the directory of a set, None if there is none."""
    base = root / name
    default = base / ".config" / "metadata.json"
    if config is None and not _versions(base) and default.exists():
        config = read_json(default, root).get("default_config_name")
        if not isinstance(config, str) or not _WORD.fullmatch(config):
            raise DataError(f"{default}: names the config {config!a}; accepted is a word")
    base = base / config if config else base
    versions = _versions(base)
    if version or not versions:
        return base / version if version in versions else None
    return base / max(versions, key=lambda version: [int(part) for part in version.split(".")])


def _versions(base: Path) -> list[str]:
    if not base.is_dir():
        return []
    return [entry.name for entry in base.iterdir() if _VERSION.fullmatch(entry.name)]


def _read(directory: Path, root: Path) -> Prepared:
    name = f"tfds:{directory.parent.relative_to(root).as_posix()}:{directory.name}"
    file_format, index = _read_index(directory)
    features = read_features(directory)
    path = directory / PROVENANCE
    if not os.path.lexists(path):
        return Prepared(name, directory, file_format, features, index, {}, {})
    noted = read_json(path, directory)
    try:
        rate = int(noted["data"]["audio"]["sample_rate"])
        features = [replace(feature, sample_rate=rate) for feature in features]
        shards = [shard for split in noted["splits"].values() for shard in split["shards"].items()]
        sizes = {shard: facts["bytes"] for shard, facts in shards}
        digests = {split: facts["sha256"] for split, facts in noted["splits"].items()}
    except MALFORMED as error:
        raise DataError(f"{path}: unusable ({error!r}); accepted is what was prepared") from error
    return Prepared(name, directory, file_format, features, index, sizes, digests)


def _read_index(directory: Path) -> tuple[str, Any]:
    """Returns the format of the shards, and TFDS's index of the splits."""
    import tensorflow_datasets as tfds

    path = directory / "dataset_info.json"
    info = read_json(path, directory)
    try:
        file_format, name, splits = info.get("fileFormat", "tfrecord"), info["name"], []
        if file_format not in READERS:
            raise ValueError(f"format {file_format!a} where {' or '.join(READERS)} can be read")
        for split in info.get("splits", []):
            split_name, template = split["name"], split.get("filepathTemplate", "")
            words = all(map(_WORD.fullmatch, (name, split_name)))
            if not (words and _TEMPLATE.fullmatch(template)):
                raise ValueError(f"files called {template!a} of {name!a}, {split_name!a}")
            lengths = [int(length) for length in split.get("shardLengths", [])]
            if min(lengths, default=0) < 0:
                raise ValueError("a negative number of records")
            names = tfds.core.ShardedFileTemplate(
                directory, template, name, split_name, file_format
            )
            splits.append(tfds.core.SplitInfo(split_name, lengths, 0, names))
        return file_format, tfds.core.SplitDict(splits)
    except MALFORMED as error:
        raise DataError(f"{path}: unusable ({error!r}); accepted is what TFDS wrote") from error


def count(prepared: Prepared, split: str) -> int:
    """Returns the number of examples of a split expression; see `records`."""
    return sum(take for _, _, take in _pieces(prepared, split))


def sample_rate(prepared: Prepared, feature: str, modality: str) -> int | None:
    """Returns the samples per second of the sound in a feature, None if the set does not say."""
    return _choose(prepared, feature, modality).sample_rate


def _choose(prepared: Prepared, name: str, modality: str) -> Feature:
    # A config may name the feature of the set in the catalogue that one of ours takes the place of.
    if prepared.digests and name not in {feature.name for feature in prepared.features}:
        name = ""
    return choose(prepared.features, name, modality, prepared.name)


def fingerprint(prepared: Prepared, split: str) -> dict[str, Any]:
    """Returns what decides the examples of a split expression, as JSON has it."""
    files = []
    for path, skip, take in _pieces(prepared, split):
        status = os.stat(path) if os.path.exists(path) else None
        found = [status.st_size, status.st_mtime_ns] if status else None
        files.append([os.path.relpath(path, prepared.directory), skip, take, found])
    return {"name": prepared.name, "split": split, "files": files, "sha256": prepared.digests}


def records(
    prepared: Prepared, split: str, feature: str, modality: str, bad: BadRecords
) -> Iterator[tuple[str, bytes | NDArray[Any]]]:
    """Reads the examples of a split in order.

    Args:
        prepared: the set.
        split: as TFDS has it: train, train[:-5000], test+validation[10%:], all.
        feature: data.tfds.feature; see `tfds_features.choose`.
        modality: bytes, image or audio.
        bad: counts examples that are damaged.

    Yields:
        A name for the error and the contents: bytes of text, or of an image's or a sound's file;
        else the array that is stored.

    Raises:
        UserError: there is no such split or feature.
        DataError: more examples are damaged than `bad` accepts; or, in a set of our own, a shard
            or a split is not what was written.
    """
    chosen = _choose(prepared, feature, modality)
    decode = chosen.decoder()
    before, number, digest = bad.count, 0, hashlib.sha256()
    for path, skip, take in _pieces(prepared, split):
        _check_shard(prepared, path)
        for record in read_shard(path, prepared.file_format, skip, take):
            name, number = f"{prepared.name}/{split}#{number}", number + 1
            if isinstance(record, DataError):
                bad.add(record)
                continue
            try:
                contents = decode(record)
            except Exception as error:  # TFDS raises whatever a damaged example makes it run into
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                bad.add(DataError(f"{name} ({path}): damaged ({reason}); accepted is an example"))
                continue
            add_to_digest(digest, contents)
            yield name, contents
    noted = prepared.digests.get(split) if chosen.name == "data" else None
    if noted and bad.count == before and digest.hexdigest() != noted:
        raise DataError(
            f"{prepared.directory}: the split {split} has another SHA-256 than {PROVENANCE} says; "
            "accepted is the set as it was prepared"
        )


def add_to_digest(digest: Any, contents: bytes | NDArray[Any]) -> None:
    """Adds an example to the SHA-256 of a split: its length in 8 bytes, little-endian, and itself.

    The bytes of an array are those of its elements in C order.
    """
    data = contents if isinstance(contents, bytes) else contents.tobytes()
    digest.update(len(data).to_bytes(8, "little") + data)


def _pieces(prepared: Prepared, split: str) -> list[tuple[str, int, int]]:
    """Returns the path of every shard of a split, the records to skip in it, and those to take."""
    try:
        pieces = prepared.split_infos[split].file_instructions
    except (KeyError, ValueError, NotImplementedError, AssertionError) as error:
        there = ", ".join(prepared.splits) or "none at all"
        raise EmptySplitError(
            f"data.split: {prepared.name} has no {split!r}; accepted are its splits ({there}), "
            "slices such as train[:-1000] or train[90%:], and sums of them with +"
        ) from error
    return [(str(piece.filename), piece.skip, piece.take) for piece in pieces]


def _check_shard(prepared: Prepared, path: str) -> None:
    """Refuses a shard that is not the file it should be; one that is missing has damaged records.

    Raises:
        DataError: it lies elsewhere, is no regular file, or has not the size that was noted.
    """
    name = os.path.relpath(path, prepared.directory)
    if os.path.lexists(path) or name in prepared.sizes:
        size = check_file(Path(path), prepared.directory)
        if size != prepared.sizes.get(name, size):
            raise DataError(
                f"{path}: has {size} bytes; accepted is the file of {prepared.sizes[name]} bytes "
                f"that {PROVENANCE} notes"
            )
