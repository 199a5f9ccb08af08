"""Every key of a run's config: what it may be, and what a run that goes on says to a new value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megabyte_jax import sharding
from megabyte_jax.data import images
from megabyte_jax.models.config import DTYPES

# What becomes of a key that differs from what a run in its work directory has.
FREE = "free"  # the updates to come are what they would have been
ACCEPT = "needs --accept_config_change"  # their numbers change
REFUSED = "refused"  # its checkpoints cannot be read, or the bytes that an update sees change


class Key(NamedTuple):
    """A key of a config.

    Attributes:
        ok: of a value of any type, whether it is accepted.
        accepted: what is, in words.
        change: `FREE`, `ACCEPT` or `REFUSED`.
    """

    ok: Callable[[Any], bool]
    accepted: str
    change: str = FREE


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(low: float, high: float, change: str = FREE, *, or_zero: bool = False) -> Key:
    """A number from `low` to `high`, or 0 too."""
    accepted = f"a number from {low:g} to {high:g}" + (", or 0" if or_zero else "")
    return Key(
        lambda x: _is_number(x) and (low <= x <= high or (or_zero and x == 0)), accepted, change
    )


def _whole(low: int, bits: int = 31, change: str = FREE) -> Key:
    """A whole number from `low` to below 2 ** bits."""
    accepted = f"a whole number of at least {low} and below 2**{bits}"
    return Key(lambda x: _is_whole(x) and low <= x < 2**bits, accepted, change)


def _one_of(*choices: str, change: str = FREE) -> Key:
    accepted = "one of " + ", ".join(choices)
    return Key(lambda x: isinstance(x, str) and x in choices, accepted, change)


def _text(max_bytes: int, what: str, change: str = FREE, *, path: bool = False) -> Key:
    """Text of some bytes; of a path or the name of one no NUL, and if `what` must be given, any."""

    def ok(x: Any) -> bool:
        try:
            return (
                isinstance(x, str)
                and len(x.encode("utf-8", "surrogateescape")) <= max_bytes
                and not (path and "\0" in x)
            )
        except UnicodeEncodeError:
            return False

    return Key(ok, f"{what} of at most {max_bytes} bytes", change)


def _given(text: Key) -> Key:
    return text._replace(ok=lambda x: text.ok(x) and x != "")


def _are_ranges(x: Any) -> bool:
    """Whether x is a row of at most 10,000 pairs of a first and a stop."""
    return (
        isinstance(x, (tuple, list))
        and all(
            isinstance(pair, (tuple, list))
            and len(pair) == 2
            and all(_is_whole(end) and 0 <= end < 2**31 for end in pair)
            and pair[0] < pair[1]
            for pair in x[:10_001]
        )
        and len(x) <= 10_000
    )


_PATH = 4095  # bytes, the most that Linux opens
_NAME = _given(_text(255, "a sub-folder or TFDS split", REFUSED, path=True))
_FOLDER = _text(_PATH, "a directory, or nothing for the default,", path=True)
_STEPS = _whole(0)
_BYTES = _whole(0, 53)
_SECONDS = _number(0.01, 1e9, or_zero=True)
_AXIS = Key(
    lambda x: _is_whole(x) and (x == -1 or 1 <= x < 2**20),
    "a number of devices, below 2**20, or -1 for what the other axes leave",
)


def _boolean(x: Any) -> bool:
    return isinstance(x, bool)


# Bounds of the optimizer leave room in float32: with any of them a first update is finite.
KEYS: dict[str, Key] = {
    "seed": _whole(0, 32, REFUSED),
    "data.source": _given(
        _text(_PATH, "stdlib, tfds:NAME, or a file, directory or glob", REFUSED, path=True)
    ),
    "data.modality": _one_of("bytes", "image", "audio", change=REFUSED),
    "data.separator": _text(2**16, "text", REFUSED),
    "data.max_bad_records": _whole(0),
    "data.cache_dir": _FOLDER,
    "data.workers": _whole(0, 10),
    "data.tfds.data_dir": _FOLDER,
    "data.tfds.feature": _text(_PATH, "the name of a feature, or nothing,", REFUSED, path=True),
    "data.image.height": _whole(1, 13, REFUSED),
    "data.image.width": _whole(1, 13, REFUSED),
    "data.image.scan": _one_of("raster", "patch", change=REFUSED),
    "data.image.resize": _one_of(*images.RESIZE, change=REFUSED),
    "data.audio.sample_rate": _whole(1, 20, REFUSED),
    "data.split.by": _one_of("document", "bytes", "name", change=REFUSED),
    "data.split.valid_size": _number(0, 2**53, REFUSED),
    "data.split.test_size": _number(0, 2**53, REFUSED),
    "data.split.train": _NAME,
    "data.split.valid": _NAME,
    "data.split.test": _NAME,
    **{f"mesh.{axis}": _AXIS for axis in sharding.AXES},
    "train.batch_size": _whole(1, 31, REFUSED),
    "train.grad_accumulation": _whole(1, 31, ACCEPT),
    "train.num_bytes": _whole(0, 53, ACCEPT),
    "train.num_steps": _whole(0, 31, ACCEPT),
    # Checkpoints say what had been skipped before them, which is compared there.
    "train.skip": Key(
        _are_ranges, "((first, stop), ...) of batches, each 0 <= first < stop, at most 10000"
    ),
    "optimizer.name": _one_of("adamw", "muon", change=REFUSED),
    "optimizer.learning_rate": _number(1e-12, 10, ACCEPT),
    "optimizer.schedule": _one_of("linear", "cosine", "constant", change=ACCEPT),
    "optimizer.end_fraction": _number(0, 0.999, ACCEPT),
    "optimizer.warmup_steps": _whole(0, 31, ACCEPT),
    "optimizer.warmup_bytes": _whole(0, 53, ACCEPT),
    "optimizer.b1": _number(0, 0.99999, ACCEPT),
    "optimizer.b2": _number(0, 0.99999, ACCEPT),
    "optimizer.eps": _number(1e-16, 1, ACCEPT),
    "optimizer.weight_decay": _number(0, 100, ACCEPT),
    "optimizer.clip_norm": _number(1e-6, 1e9, ACCEPT),
    "optimizer.state_dtype": _one_of(*DTYPES, change=REFUSED),
    "optimizer.offload": Key(_boolean, "True or False"),
    "guard.policy": _one_of("abort", "skip_update", "rollback_skip", change=ACCEPT),
    "guard.max_loss": _number(0.01, 1e9, ACCEPT, or_zero=True),
    "guard.max_grad_norm": _number(1e-9, 1e30, ACCEPT, or_zero=True),
    "guard.rollback_window": _whole(0, 31, ACCEPT),
    "guard.max_skips": _whole(1, 31, ACCEPT),
    "guard.replica_interval": _STEPS,
    **{f"watchdog.{what}_seconds": _SECONDS for what in ("step", "data", "pause", "peer")},
    "log_interval": _whole(1),
    "eval.interval": _STEPS,
    "eval.batch_size": _whole(1),
    "eval.num_bytes": _BYTES,
    "sample.interval": _STEPS,
    "sample.prompt": _text(2**20, "text"),
    "sample.num_bytes": _STEPS,
    "sample.temperature": _number(1e-3, 1e3, or_zero=True),
    "checkpoint.interval": _STEPS,
    "checkpoint.keep": _whole(2),
    "checkpoint.keep_interval": _STEPS,
}

# Fields of the models, whose own config classes check them; the others say what parameters there
# are and what they compute, and are refused.
_MODEL_CHANGES = {
    "dropout": ACCEPT,
    "dtype": ACCEPT,
    "remat": FREE,
    "scan_unroll": FREE,
    "group_size": FREE,
}


def change_of(name: str) -> str:
    """What a run that goes on says to another value of a key: `FREE`, `ACCEPT` or `REFUSED`."""
    if name.startswith("model."):
        return _MODEL_CHANGES.get(name.split(".")[-1], REFUSED)
    return KEYS[name].change if name in KEYS else REFUSED


# Keys that runs of older versions do not have -> what these versions did.
ADDED: dict[str, Any] = {
    "train.skip": (),
    "guard.policy": "abort",
    "guard.max_loss": 0.0,
    "guard.max_grad_norm": 0.0,
    "guard.rollback_window": 100,
    "guard.max_skips": 10,
    "guard.replica_interval": 1000,
    "watchdog.step_seconds": 600.0,
    "watchdog.data_seconds": 300.0,
    "watchdog.pause_seconds": 7200.0,
    "watchdog.peer_seconds": 60.0,
}
