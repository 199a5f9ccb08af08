"""The config of a run: checked before anything starts, kept in the work directory as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from megabyte_jax.errors import UserError
from megabyte_jax.models.config import MegabyteConfig, from_mapping

_Check = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> _Check:
    """A finite number from `low` (or above it, if open) to below `high`."""
    text = f"a number {'above' if open_low else 'of at least'} {low:g}"
    text += f" and below {high:g}" if high < math.inf else ""
    return (lambda x: (low < x if open_low else low <= x) and x < high and math.isfinite(x)), text


def _one_of(*choices: str) -> _Check:
    return (lambda x: x in choices), "one of " + ", ".join(choices)


def _whole(low: int) -> _Check:
    return (lambda x: low <= x < 2**53), f"a whole number of at least {low}"


_STEPS = _whole(0)
_TEXT: _Check = ((lambda x: isinstance(x, str)), "text")

# Every key outside `model`, which MegabyteConfig checks.
CHECKS: dict[str, _Check] = {
    "seed": ((lambda x: 0 <= x < 2**32), "a whole number from 0 to below 2**32"),
    "data.source": ((lambda x: x != ""), "stdlib, or a file, directory or glob"),
    "data.split.by": _one_of("document", "bytes", "folder"),
    "data.split.valid_size": _number(0),
    "data.split.test_size": _number(0),
    "train.batch_size": _whole(1),
    "train.grad_accumulation": _whole(1),
    "train.num_bytes": _STEPS,
    "train.num_steps": _STEPS,
    "optimizer.name": _one_of("adamw", "muon"),
    "optimizer.learning_rate": _number(0, open_low=True),
    "optimizer.schedule": _one_of("linear", "cosine", "constant"),
    "optimizer.end_fraction": _number(0, 1),
    "optimizer.warmup_steps": _STEPS,
    "optimizer.warmup_bytes": _STEPS,
    "optimizer.b1": _number(0, 1),
    "optimizer.b2": _number(0, 1),
    "optimizer.eps": _number(0, open_low=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.clip_norm": _number(0, open_low=True),
    "log_interval": _whole(1),
    "eval.interval": _STEPS,
    "eval.batch_size": _whole(1),
    "eval.num_bytes": _STEPS,
    "sample.interval": _STEPS,
    "sample.prompt": _TEXT,
    "sample.num_bytes": _STEPS,
    "sample.temperature": _number(0),
    "checkpoint.interval": _STEPS,
    "checkpoint.keep": _whole(1),
    "checkpoint.keep_interval": _STEPS,
}


def validate(config: ConfigDict) -> MegabyteConfig:
    """Checks every key of a config.

    Args:
        config: as `configs/base.py` declares it.

    Returns:
        The model's config, `config.model` as a frozen dataclass.

    Raises:
        UserError: a key is missing, unknown or out of range.
    """
    flat = _flatten({name: value for name, value in config.items() if name != "model"})
    for name in flat.keys() - CHECKS.keys():
        raise UserError(f"config.{name}: unknown; accepted are the keys of configs/base.py")
    for name in CHECKS.keys() - flat.keys():
        raise UserError(f"config.{name}: missing; configs/base.py declares it")
    for name, (ok, accepted) in CHECKS.items():
        if not ok(flat[name]):
            raise UserError(f"config.{name}={flat[name]!r}: accepted is {accepted}")
    train = config.train
    if train.batch_size % train.grad_accumulation:
        raise UserError(
            f"config.train.grad_accumulation={train.grad_accumulation}: accepted is a divisor of "
            f"train.batch_size={train.batch_size}"
        )
    if bool(train.num_steps) == bool(train.num_bytes):
        raise UserError(
            f"config.train.num_steps={train.num_steps}: accepted is a budget either in "
            f"num_steps or in num_bytes (now {train.num_bytes}), the other 0"
        )
    return from_mapping(config.model.to_dict())


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if hasattr(value, "items"):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def open_workdir(workdir: str, config: ConfigDict) -> Path:
    """Makes the work directory, or enters one of the same model, and keeps the config there.

    Args:
        workdir: path of the directory.
        config: validated.

    Returns:
        The directory.

    Raises:
        UserError: it is not a directory, cannot be written, or holds another model.
    """
    path = Path(workdir)
    stored = path / "config.json"
    if stored.exists():
        _require_same_model(path, load(workdir), config)
    elif path.is_dir() and (path / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: holds checkpoints but no config.json")
    fields = config.to_dict()
    if fields["data"]["source"] != "stdlib":  # eval.py may be started elsewhere
        fields["data"]["source"] = os.path.abspath(os.path.expanduser(fields["data"]["source"]))
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    part = path / "config.json.part"
    try:
        path.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        os.replace(part, stored)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; accepted is a directory that can be written"
        ) from None
    return path


def _require_same_model(path: Path, stored: ConfigDict, config: ConfigDict) -> None:
    old, new = _of_the_checkpoint(stored), _of_the_checkpoint(config)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"--workdir={path}: holds another model, with {name}={old.get(name)!r} where the "
                f"config has {new.get(name)!r}; accepted is a new directory or the same model"
            )


def _of_the_checkpoint(config: ConfigDict) -> dict[str, Any]:
    """The keys that say what a checkpoint holds and means; a run may resume with others changed."""
    flat = _flatten(config)
    free = ("dropout", "dtype", "remat", "scan_unroll")
    return {
        name: value
        for name, value in flat.items()
        if name == "optimizer.name"
        or (name.startswith("model.") and name.split(".")[-1] not in free)
    }


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
        fields["model"]["conv_kernels"] = tuple(fields["model"]["conv_kernels"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "config.json is damaged"
        raise UserError(
            f"--workdir={workdir}: {reason}; accepted is the directory of a run of train.py"
        ) from None
    return ConfigDict(fields)
