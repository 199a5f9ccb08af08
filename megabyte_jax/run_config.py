"""The config of a run: checked before anything starts, kept in the work directory as JSON."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from megabyte_jax import distributed, flops, foreign, run_changes
from megabyte_jax.config_keys import ADDED, KEYS
from megabyte_jax.data import images, splits
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.tfds_sets import is_tfds
from megabyte_jax.errors import UserError, shown
from megabyte_jax.models.config import ModelConfig, from_mapping
from megabyte_jax.run_changes import flatten

_MAX_PARAMETERS = 2**44
_MAX_BATCH_BYTES = 2**40
_MAX_JSON = 2**20  # bytes of a file in a work directory, where one has some thousands


def validate(config: ConfigDict) -> ModelConfig:
    """Checks every key of a config.

    Args:
        config: as `configs/base.py` declares it.

    Returns:
        The model's config, `config.model` as a frozen dataclass.

    Raises:
        UserError: a key is missing, unknown or out of range.
    """
    try:
        flat = flatten({name: value for name, value in config.items() if name != "model"})
        fields = config.model.to_dict()
    except Exception as error:  # a config file may return anything, its references raise anything
        raise UserError(
            f"--config={type(config).__name__}: {type(error).__name__}: {shown(str(error))[1:-1]}; "
            "accepted is a ConfigDict with the keys of configs/base.py"
        ) from None
    for name in sorted(map(str, flat.keys() - KEYS.keys())):
        raise UserError(f"{shown(name)[1:-1]}: unknown; accepted are the keys of configs/base.py")
    for name in sorted(KEYS.keys() - flat.keys()):
        raise UserError(
            f"{name}: missing, as in runs of older versions; accepted is what configs/base.py has"
        )
    for name, key in KEYS.items():
        if not key.ok(flat[name]):
            raise UserError(f"{name}={shown(flat[name])}: accepted is {key.accepted}")
    split = config.data.split
    splits.check_sizes(split.by, split.valid_size, split.test_size)
    model = from_mapping(fields)
    _check_sizes(config, model)
    _check_modality(config.data, model.patch_size)
    return model


def _check_sizes(config: ConfigDict, model: ModelConfig) -> None:
    train = config.train
    if train.batch_size % train.grad_accumulation:
        raise UserError(
            f"train.grad_accumulation={train.grad_accumulation}: accepted is a divisor of "
            f"train.batch_size={train.batch_size}"
        )
    for name, size in (("train", train.batch_size), ("eval", config.eval.batch_size)):
        if size * model.seq_len > _MAX_BATCH_BYTES:
            raise UserError(
                f"{name}.batch_size={size}: accepted is at most 2**40 bytes in all, "
                f"{_MAX_BATCH_BYTES // model.seq_len} sequences of model.seq_len={model.seq_len}"
            )
    parameters = flops.num_parameters(model)
    if parameters > _MAX_PARAMETERS:
        raise UserError(
            f"model: has {parameters:,} parameters by model.*.dim, num_layers, ... and seq_len; "
            "accepted are at most 2**44"
        )


def _check_modality(data: ConfigDict, patch_size: int) -> None:
    if data.modality == "bytes":
        return
    # Half an image is none, and one byte between two sounds would cut all later samples in two.
    if data.split.by == "bytes":
        raise UserError(
            f"data.split.by='bytes': accepted is document or name for data.modality={data.modality}"
        )
    if data.separator:
        raise UserError(
            f"data.separator={data.separator!r}: accepted is none for data.modality={data.modality}"
        )
    if data.modality == "image":
        side = images.block_side(data.image.scan, patch_size)
        for name in ("height", "width"):
            if data.image[name] % side:
                raise UserError(
                    f"data.image.{name}={data.image[name]}: accepted is a multiple of {side}, the "
                    f"side of a patch of model.patch_size={patch_size} bytes"
                )


def open_workdir(
    workdir: str,
    config: ConfigDict,
    splits: Mapping[str, Corpus],
    *,
    accept_config_change: bool = False,
) -> Path:
    """Makes the work directory, or enters one of the same run, and keeps the config there.

    Args:
        workdir: path of the directory.
        config: validated.
        splits: of the data, by name, which a run that goes on must find as they were.
        accept_config_change: whether a run goes on that is not the one that began.

    Returns:
        The directory.

    Raises:
        UserError: it is not a directory, cannot be written, or holds another run.
    """
    found = changes(workdir, config)
    run_changes.check(workdir, found, accept_config_change, tell=distributed.is_primary())
    held = {
        name: {
            "documents": len(corpus),
            "bytes": corpus.num_bytes,
            "fingerprint": corpus.fingerprint,
        }
        for name, corpus in splits.items()
    }
    path = Path(workdir)
    _require_same_data(path, held, config.data.source)
    try:
        path.mkdir(parents=True, exist_ok=True)
        written = (("data.json", held), ("config.json", _resolved(config).to_dict()))
        for name, fields in written if distributed.is_primary() else ():
            part = path / f"{name}.part"
            part.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            os.replace(part, path / name)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; accepted is a directory that can be written"
        ) from None
    return path


def changes(workdir: str, config: ConfigDict) -> list[run_changes.Change]:
    """In what a config differs from that of the run in a work directory; none if there is no run.

    Args:
        workdir: path of the directory, which may not be there.
        config: validated.

    Raises:
        UserError: it is no directory of a run, and none that could become one.
    """
    path = Path(workdir)
    try:
        if not workdir or (path.exists() and not path.is_dir()):
            raise OSError(errno.ENOTDIR, "Not a directory")
        if (path / "config.json").exists():
            return run_changes.differences(_read(path), _resolved(config))
        checkpoints = (path / "checkpoints").exists()
    except (OSError, ValueError) as error:  # a ValueError of a path with NUL in it
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--workdir={shown(workdir)}: {reason}; accepted is a directory that can be written"
        ) from None
    if checkpoints:
        raise UserError(f"--workdir={workdir}: holds checkpoints but no config.json")
    return []


def _resolved(config: ConfigDict) -> ConfigDict:
    """The config with absolute paths, for eval.py may be started elsewhere."""
    config = config.copy_and_resolve_references()
    data = config.data
    if data.source != "stdlib" and not is_tfds(data.source):
        data.source = os.path.abspath(os.path.expanduser(data.source))
    for part, name in ((data, "cache_dir"), (data.tfds, "data_dir")):
        if part[name]:
            part[name] = os.path.abspath(os.path.expanduser(part[name]))
    return config


def _require_same_data(path: Path, held: Mapping[str, Any], source: str) -> None:
    stored = path / "data.json"
    if not stored.exists():
        return
    try:
        before = foreign.read_json(stored, path, _MAX_JSON)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir={path}: data.json cannot be read ({error}); accepted is the directory of a "
            "run of train.py"
        ) from None
    for name in sorted(held):
        if before.get(name) != held[name]:
            raise UserError(
                f"data.source={source!r}: its {name} split is not what the run in {path} began "
                f"with ({before.get(name)} where now it is {held[name]}); accepted are the data as "
                "they were, or a new directory"
            )


def load(workdir: str | Path) -> ConfigDict:
    """Reads the config that a run kept in its work directory.

    Args:
        workdir: path of the directory.

    Returns:
        The config; keys newer than the run have the values that say what its version did.

    Raises:
        UserError: there is no readable config.
    """
    config = _read(Path(workdir))
    for name in sorted(ADDED.keys() - flatten(config).keys()):
        section, _, key = name.rpartition(".")
        if section not in config:
            config[section] = ConfigDict()
        config[section][key] = ADDED[name]
    return config


def _read(workdir: Path) -> ConfigDict:
    try:
        config = ConfigDict(foreign.read_json(workdir / "config.json", workdir, _MAX_JSON))
        config.model.items()
        return config
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "config.json is damaged"
        raise UserError(
            f"--workdir={workdir}: {reason}; accepted is the directory of a run of train.py"
        ) from None
