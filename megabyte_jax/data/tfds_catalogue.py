"""Downloading and preparing a set of TFDS's own catalogue, whose builders are TFDS's code."""

import contextlib
import difflib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megabyte_jax.errors import DataError, UserError

OWN = ("byte_files", "image_files", "audio_files")

# TFDS stops importing its catalogue at the first module that lacks a package (nearest_neighbors
# wants h5py), and takes what comes after it for unknown.
_MODULES = ("question_answering", "structured", "summarization", "text", "translate", "video")
_RETRIES = 4  # TFDS's own 10 take more than three minutes to find that there is no network


def default_config(name: str, source: str, root: Path, option: str) -> str | None:
    """Returns the config that TFDS takes where none is named, None if the set has none.

    Args:
        name: of the set.
        source: what the user gave.
        root: where it was looked for.
        option: what the user calls `source`, for the error.

    Raises:
        UserError: TFDS knows no such set.
        DataError: it is one of ours, and nobody has prepared it there.
    """
    configs = _builder_class(name, source, root, option).BUILDER_CONFIGS
    return configs[0].name if configs else None


def prepare(
    name: str, config: str | None, version: str | None, source: str, root: Path, option: str
) -> Path:
    """Downloads and prepares a set as array_record, with TFDS's progress bars on stderr.

    TFDS writes into a directory of another name, and renames it when all is there.

    Args:
        name: of the set.
        config: its config, None if it has none.
        version: None is the builder's own.
        source: what the user gave.
        root: the directory that gets it, as NAME[/CONFIG]/VERSION.
        option: what the user calls `source`, for the error.

    Returns:
        The directory of the set.

    Raises:
        UserError: TFDS knows no such set or config.
        DataError: there is no network, or a package is missing, or the builder failed.
    """
    from tensorflow_datasets.core.download import downloader

    builder_class = _builder_class(name, source, root, option)
    configs = [one.name for one in builder_class.BUILDER_CONFIGS]
    if config not in (configs or [None]):
        near = ", ".join(difflib.get_close_matches(config or "", configs, 3, 0.3) or configs[:10])
        raise UserError(
            f"{option}={source!r}: {name} has no config {config!r}; accepted is "
            f"{near or f'tfds:{name} without one'}"
        )
    downloader.MAX_RETRIES = _RETRIES
    with _one_line_errors(source, root), contextlib.redirect_stdout(sys.stderr):
        builder = builder_class(data_dir=str(root), config=config, version=version)
        builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


def _builder_class(name: str, source: str, root: Path, option: str) -> Any:
    import tensorflow_datasets as tfds

    if name in OWN:
        raise DataError(
            f"{option}={source!r}: not found in {root}; accepted is a set that "
            "`python -m megabyte_jax.data prepare` has written there"
        )
    for module in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{module}")
    try:
        return tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = ", ".join(difflib.get_close_matches(name, known, 3)) or "nothing like it"
        raise UserError(
            f"{option}={source!r}: neither in {root} nor in the catalogue of TFDS, which has {near}"
            "; accepted is a name of that catalogue or of a prepared set"
        ) from None
    except ImportError as error:
        raise _needs_package(source, root, error) from error


@contextlib.contextmanager
def _one_line_errors(source: str, root: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise _needs_package(source, root, error) from error
    except Exception as error:  # a builder is a program of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{source}: not found in {root}, and could not be downloaded and prepared "
            f"({reason[:800]}); accepted is a prepared copy there, or what that asks for, such "
            "as a network"
        ) from error


def _needs_package(source: str, root: Path, error: ImportError) -> DataError:
    package = (error.name or "").partition(".")[0]
    needed = package or f"a package that is not here ({' '.join(str(error).split())[:200]})"
    install = (
        "'megabyte-jax[tf]'" if package.startswith("tensorflow") else package or "that package"
    )
    return DataError(
        f"{source}: not found in {root}, and TFDS needs {needed} to prepare it; accepted is a "
        f"prepared copy there, or pip install {install}"
    )
