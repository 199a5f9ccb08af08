"""The splits of any source, as a run's config describes it: the one way to the documents."""

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from megabyte_jax.data import images, media, splits, tfds_sets
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus, Document, open_corpus
from megabyte_jax.data.flat import flatten
from megabyte_jax.data.windows import TrainWindows, prefetch
from megabyte_jax.errors import DataError, EmptySplitError, UserError


def open_splits(
    data: Any, names: Sequence[str], patch_size: int, *, download: bool = True
) -> list[Corpus]:
    """Opens splits of the source that a config names.

    Files of modality `bytes` are read where they are. Images, sound and TFDS sets are decoded once,
    with a progress bar, into the flat layout of `megabyte_jax.data.flat`.

    Args:
        data: the config's, validated.
        names: train, valid or test.
        patch_size: P in bytes, which the patch scan of images depends on.
        download: whether a set of TFDS that is not there may be downloaded.

    Returns:
        The documents of each split, as the model reads them.

    Raises:
        UserError: an option is wrong, or a split is empty.
        DataError: data that cannot be read or prepared.
    """
    bad = BadRecords(data.max_bad_records)
    if tfds_sets.is_tfds(data.source):
        if data.split.by != "name":
            raise UserError(
                f"data.split.by={data.split.by!r}: accepted is name for a TFDS source, whose "
                "splits data.split.train, .valid and .test name"
            )
        prepared = tfds_sets.open_set(data.source, data.tfds.data_dir, download=download)
        found = [splits.find_names(data.split[name], prepared.splits) for name in names]
        for name, part in zip(names, found, strict=True):
            if tfds_sets.count(prepared, "+".join(part)) <= 0:
                raise EmptySplitError(
                    f"data.split.{name}={data.split[name]!r}: of {prepared.name} it holds no "
                    "record; accepted is a split or a slice with some"
                )
        opened = [_from_tfds(prepared, "+".join(part), data, patch_size, bad) for part in found]
    else:
        whole = open_corpus(data.source, bad=bad)
        opened = [splits.split_corpus(whole, name, **data.split) for name in names]
        if data.modality != "bytes":
            opened = [_from_files(part, data, patch_size, bad) for part in opened]
    bad.report()
    return opened


def open_all(source: str, data: Any, patch_size: int, option: str) -> Corpus:
    """Opens all documents of another source, decoded as a config says.

    Args:
        source: see `data.source`; of a TFDS set all splits together.
        data: the config's, validated.
        patch_size: P in bytes.
        option: what the user calls `source`, for the error.

    Raises:
        UserError: there is no such source.
        DataError: data that cannot be read or prepared.
    """
    bad = BadRecords(data.max_bad_records)
    if tfds_sets.is_tfds(source):
        prepared = tfds_sets.open_set(source, data.tfds.data_dir, option=option)
        opened = _from_tfds(prepared, "all", data, patch_size, bad)
    else:
        opened = open_corpus(source, bad=bad, option=option)
        if data.modality != "bytes":
            opened = _from_files(opened, data, patch_size, bad)
    bad.report()
    return opened


def train_windows(config: Any, documents: Corpus, seq_len: int) -> TrainWindows:
    """Returns the windows that a run trains on.

    Args:
        config: of the run, validated.
        documents: of the training split.
        seq_len: T in bytes.

    Raises:
        UserError: there are fewer bytes than in one window.
    """
    return TrainWindows(
        documents,
        seq_len,
        config.train.batch_size,
        config.seed,
        unit=media.unit(config.data),
        separator=config.data.separator.encode("utf-8", "surrogateescape"),
    )


def _from_files(corpus: Corpus, data: Any, patch_size: int, bad: BadRecords) -> Corpus:
    files = hashlib.sha256(os.path.abspath(corpus.name).encode("utf-8", "surrogateescape"))
    for document in corpus:
        if isinstance(document.source, str):
            status = os.stat(document.source)
            # A copy may keep name, size and time of the file that it replaces, but not its ctime.
            found = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            files.update(f"{document.name!a} {found}\n".encode())
        else:
            files.update(f"{document.name!a} {len(document)}\n".encode())
            files.update(document.data.data)
    key = {"files": files.hexdigest(), **_form(data, patch_size)}

    def decode(document: Document) -> bytes | DataError:
        path = document.source if isinstance(document.source, str) else document.name
        return _decode(media.from_file, document.data.tobytes(), path, data, patch_size)

    decoded = prefetch(decode, corpus, os.cpu_count() or 1)
    contents = _usable(decoded, len(corpus), bad)
    return flatten(data.cache_dir, corpus.name, key, contents, bad)


def _from_tfds(
    prepared: tfds_sets.Prepared, split: str, data: Any, patch_size: int, bad: BadRecords
) -> Corpus:
    fingerprint = tfds_sets.fingerprint(prepared, split)
    key = {"tfds": fingerprint, "feature": data.tfds.feature, **_form(data, patch_size)}

    rate = None
    if data.modality == "audio":
        rate = tfds_sets.sample_rate(prepared, data.tfds.feature, data.modality)

    def decode(record: tuple[str, bytes | NDArray[Any]]) -> bytes | DataError:
        name, contents = record
        if isinstance(contents, bytes):
            return _decode(media.from_file, contents, name, data, patch_size)
        return _decode(media.from_array, contents, name, data, patch_size, rate)

    records = tfds_sets.records(prepared, split, data.tfds.feature, data.modality, bad)
    decoded = prefetch(decode, records, os.cpu_count() or 1)
    contents = _usable(decoded, tfds_sets.count(prepared, split), bad)
    return flatten(data.cache_dir, prepared.name, key, contents, bad)


def _form(data: Any, patch_size: int) -> dict[str, Any]:
    """All that decides, beside the source, what its decoded bytes are."""

    def versions(*packages: str) -> dict[str, str]:
        return {package: importlib.metadata.version(package) for package in packages}

    match data.modality:
        case "image":
            side = images.block_side(data.image.scan, patch_size)
            form = {"modality": "image", **data.image, "block_side": side}
            return form | versions("pillow")
        case "audio":
            return {"modality": "audio", **data.audio} | versions("soundfile", "soxr")
    return {"modality": data.modality}


def _decode(decoder: Callable[..., bytes], *arguments: Any) -> bytes | DataError:
    try:
        return decoder(*arguments)
    except DataError as error:  # returned, because the thread that asks for it counts it
        return error


def _usable(results: Iterable[bytes | DataError], total: int, bad: BadRecords) -> Iterator[bytes]:
    bar = tqdm(results, "decoding", total, leave=False, disable=None, unit="document")
    for result in bar:
        if isinstance(result, DataError):
            bad.add(result)
        else:
            yield result
