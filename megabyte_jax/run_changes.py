"""What a run that goes on with another config says to each key that differs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from megabyte_jax.config_keys import ACCEPT, ADDED, FREE, REFUSED, change_of
from megabyte_jax.errors import UserError, shown
from megabyte_jax.models.config import from_mapping

_NOTHING = "nothing"


class Change(NamedTuple):
    """A key in which a config differs from that of the run in its work directory.

    Attributes:
        name: of the key.
        old: the value of the run, as it is shown.
        new: the value of the config, as it is shown.
        kind: `FREE`, `ACCEPT` or `REFUSED`.
    """

    name: str
    old: str
    new: str
    kind: str


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by the names of their keys, joined by points."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(stored: ConfigDict, config: ConfigDict) -> list[Change]:
    """Compares a config with the one that a run was started with.

    Args:
        stored: as it was read from the work directory.
        config: validated.

    Returns:
        What differs, by name. A key that is newer than the run is among them, and compared with
        what the version of the run did.

    Raises:
        UserError: the run has a model that this version cannot make.
    """
    old, new = _comparable(stored), _comparable(config)
    found = []
    for name in sorted(old.keys() | new.keys()):
        newer = name not in old and name in ADDED
        before = json.loads(json.dumps(ADDED[name])) if newer else old.get(name, ...)
        after = new.get(name, ...)
        if before != after or newer:
            was = f"{shown(before)} (by default: newer than the run)" if newer else _shown(before)
            kind = change_of(name) if before != after else FREE
            found.append(Change(name, was, _shown(after), kind))
    return found


def _comparable(config: ConfigDict) -> dict[str, Any]:
    fields = config.to_dict()
    # With the fields that are newer than the run at their defaults, which are what it did.
    fields["model"] = dataclasses.asdict(from_mapping(fields["model"]))
    return json.loads(json.dumps(flatten(fields)))  # as JSON has it, a tuple is a list


def _shown(value: Any) -> str:
    return _NOTHING if value is ... else shown(value)


def check(workdir: str, changes: Sequence[Change], accepted: bool, *, tell: bool = True) -> None:
    """Says what differs, a line each on stderr, and checks that the run may go on.

    Args:
        workdir: path of the directory, for the error.
        changes: of its config.
        accepted: whether the numbers of the updates to come may change.
        tell: whether this process says it.

    Raises:
        UserError: it may not; names the keys.
    """
    for change in changes if tell else ():
        print(f"{change.name}: {change.old} -> {change.new} ({change.kind})", file=sys.stderr)
    for change in changes:
        if change.kind == REFUSED:
            others = [c.name for c in changes if c.kind == REFUSED and c is not change]
            raise UserError(
                f"--workdir={workdir}: holds another run, with {change.name}={change.old} where "
                f"the config has {change.new}"
                + (f" (and others: {', '.join(others)})" if others else "")
                + "; accepted is a new directory or the same value"
            )
    names = [change.name for change in changes if change.kind == ACCEPT]
    if names and not accepted:
        raise UserError(
            f"--workdir={workdir}: the run there has other values of {', '.join(names)}; accepted "
            "are the same values, or --accept_config_change to go on with the new ones"
        )
