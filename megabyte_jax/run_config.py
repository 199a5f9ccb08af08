"""The config of a run: checked before anything starts, kept in the work directory as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from megabyte_jax import distributed, sharding
from megabyte_jax.data import images
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.tfds_sets import is_tfds
from megabyte_jax.errors import UserError
from megabyte_jax.models.config import DTYPES, ModelConfig, from_mapping

_Check = tuple[Callable[[Any], bool], str]


_FLOAT32_MAX = 3.4e38


def _number(low: float, high: float = _FLOAT32_MAX, *, open_low: bool = False) -> _Check:
    """A number from `low` (or above it, if open) to below `high`."""

    def ok(x: Any) -> bool:
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        return is_number and (low < x if open_low else low <= x) and x < high

    return ok, f"a number {'above' if open_low else 'of at least'} {low:g} and below {high:g}"


def _whole(low: int, bits: int = 31) -> _Check:
    """A whole number from `low` to below 2 ** bits."""

    def ok(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and low <= x < 2**bits

    return ok, f"a whole number of at least {low} and below 2**{bits}"


def _one_of(*choices: str) -> _Check:
    return (lambda x: x in choices), "one of " + ", ".join(choices)


def _is_text(x: Any) -> bool:
    try:
        return isinstance(x, str) and x.encode("utf-8", "surrogateescape") is not None
    except UnicodeEncodeError:
        return False


_NAME: _Check = ((lambda x: _is_text(x) and x != ""), "a sub-folder or TFDS split")
_STEPS = _whole(0)
_BYTES = _whole(0, 53)
_BOOL: _Check = ((lambda x: isinstance(x, bool)), "True or False")
_AXIS: _Check = (
    (lambda x: _whole(1)[0](x) or x == -1),
    "a number of devices, or -1 for what the other axes leave",
)

# Every key outside `model`, which the model's own config checks.
CHECKS: dict[str, _Check] = {
    "seed": _whole(0, 32),
    "data.source": (
        (lambda x: _is_text(x) and x != ""),
        "stdlib, tfds:NAME, or a file, directory or glob",
    ),
    "data.modality": _one_of("bytes", "image", "audio"),
    "data.separator": (_is_text, "text"),
    "data.max_bad_records": _whole(0),
    "data.cache_dir": (_is_text, "a directory, or nothing for the default"),
    "data.workers": _whole(0, 10),
    "data.tfds.data_dir": (_is_text, "a directory, or nothing for the default"),
    "data.tfds.feature": (_is_text, "the name of a feature, or nothing"),
    "data.image.height": _whole(1, 13),
    "data.image.width": _whole(1, 13),
    "data.image.scan": _one_of("raster", "patch"),
    "data.image.resize": _one_of(*images.RESIZE),
    "data.audio.sample_rate": _whole(1),
    "data.split.by": _one_of("document", "bytes", "name"),
    "data.split.valid_size": _number(0),
    "data.split.test_size": _number(0),
    "data.split.train": _NAME,
    "data.split.valid": _NAME,
    "data.split.test": _NAME,
    **{f"mesh.{axis}": _AXIS for axis in sharding.AXES},
    "train.batch_size": _whole(1),
    "train.grad_accumulation": _whole(1),
    "train.num_bytes": _BYTES,
    "train.num_steps": _STEPS,
    "optimizer.name": _one_of("adamw", "muon"),
    "optimizer.learning_rate": _number(0, open_low=True),
    "optimizer.schedule": _one_of("linear", "cosine", "constant"),
    "optimizer.end_fraction": _number(0, 1),
    "optimizer.warmup_steps": _STEPS,
    "optimizer.warmup_bytes": _BYTES,
    "optimizer.b1": _number(0, 1),
    "optimizer.b2": _number(0, 1),
    "optimizer.eps": _number(0, open_low=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.clip_norm": _number(0, open_low=True),
    "optimizer.state_dtype": _one_of(*DTYPES),
    "optimizer.offload": _BOOL,
    "log_interval": _whole(1),
    "eval.interval": _STEPS,
    "eval.batch_size": _whole(1),
    "eval.num_bytes": _BYTES,
    "sample.interval": _STEPS,
    "sample.prompt": (_is_text, "text"),
    "sample.num_bytes": _STEPS,
    "sample.temperature": _number(0),
    "checkpoint.interval": _STEPS,
    "checkpoint.keep": _whole(1),
    "checkpoint.keep_interval": _STEPS,
}


def validate(config: ConfigDict) -> ModelConfig:
    """Checks every key of a config.

    Args:
        config: as `configs/base.py` declares it.

    Returns:
        The model's config, `config.model` as a frozen dataclass.

    Raises:
        UserError: a key is missing, unknown or out of range.
    """
    flat = flatten({name: value for name, value in config.items() if name != "model"})
    for name in sorted(flat.keys() - CHECKS.keys()):
        raise UserError(f"{name}: unknown; accepted are the keys of configs/base.py")
    for name in sorted(CHECKS.keys() - flat.keys()):
        raise UserError(
            f"{name}: missing, as in runs of older versions; configs/base.py declares it"
        )
    for name, (ok, accepted) in CHECKS.items():
        if not ok(flat[name]):
            raise UserError(f"{name}={flat[name]!r}: accepted is {accepted}")
    train = config.train
    if train.batch_size % train.grad_accumulation:
        raise UserError(
            f"train.grad_accumulation={train.grad_accumulation}: accepted is a divisor of "
            f"train.batch_size={train.batch_size}"
        )
    model = from_mapping(config.model.to_dict())
    _check_modality(config.data, model.patch_size)
    return model


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


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by the names of their keys, joined by points."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def open_workdir(workdir: str, config: ConfigDict, splits: Mapping[str, Corpus]) -> Path:
    """Makes the work directory, or enters one of the same run, and keeps the config there.

    Args:
        workdir: path of the directory.
        config: validated.
        splits: of the data, by name, which a run that goes on must find as they were.

    Returns:
        The directory.

    Raises:
        UserError: it is not a directory, cannot be written, or holds another run.
    """
    if not workdir:
        raise UserError("--workdir='': accepted is a directory that can be written")
    path = Path(workdir)
    stored = path / "config.json"
    config = config.copy_and_resolve_references()
    # eval.py may be started elsewhere.
    data = config.data
    if data.source != "stdlib" and not is_tfds(data.source):
        data.source = os.path.abspath(os.path.expanduser(data.source))
    for part, name in ((data, "cache_dir"), (data.tfds, "data_dir")):
        if part[name]:
            part[name] = os.path.abspath(os.path.expanduser(part[name]))
    if stored.exists():
        _require_same_run(path, load(workdir), config)
    elif path.is_dir() and (path / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: holds checkpoints but no config.json")
    held = {
        name: {
            "documents": len(corpus),
            "bytes": corpus.num_bytes,
            "fingerprint": corpus.fingerprint,
        }
        for name, corpus in splits.items()
    }
    _require_same_data(path, held, config.data.source)
    try:
        path.mkdir(parents=True, exist_ok=True)
        written = ((path / "data.json", held), (stored, config.to_dict()))
        for file, fields in written if distributed.is_primary() else ():
            part = file.with_suffix(".json.part")
            part.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            os.replace(part, file)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; accepted is a directory that can be written"
        ) from None
    return path


def _require_same_run(path: Path, stored: ConfigDict, config: ConfigDict) -> None:
    old, new = _identity(stored), _identity(config)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"--workdir={path}: holds another run, with {name}={old.get(name)!r} where the "
                f"config has {new.get(name)!r}; accepted is a new directory or the same value"
            )


def _require_same_data(path: Path, held: Mapping[str, Any], source: str) -> None:
    stored = path / "data.json"
    if not stored.exists():
        return
    try:
        before = dict(json.loads(stored.read_text()))
    except (OSError, ValueError, TypeError) as error:
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


def _identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that say what a checkpoint holds and which bytes were seen at its step.

    With any other key changed a run may go on: a larger budget, another schedule or dtype.
    """
    free = {"dropout", "dtype", "remat", "scan_unroll", "group_size"}
    free |= {"cache_dir", "data_dir", "workers", "max_bad_records"}
    flat = flatten(config)
    kept = {
        name: value
        for name, value in flat.items()
        if name in ("seed", "train.batch_size", "optimizer.name", "optimizer.state_dtype")
        or (name.startswith(("data.", "model.")) and name.split(".")[-1] not in free)
    }
    return json.loads(json.dumps(kept))  # as JSON has it, a tuple is a list


def load(workdir: str | Path) -> ConfigDict:
    """Reads the config that a run kept in its work directory.

    Args:
        workdir: path of the directory.

    Raises:
        UserError: there is no readable config.
    """
    path = Path(workdir) / "config.json"
    try:
        fields = json.loads(path.read_text())
        config = ConfigDict(fields)
        config.model.items()
        return config
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "config.json is damaged"
        raise UserError(
            f"--workdir={workdir}: {reason}; accepted is the directory of a run of train.py"
        ) from None
