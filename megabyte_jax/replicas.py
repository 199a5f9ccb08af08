"""Whether the copies of a state that several devices hold are still the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

from megabyte_jax import distributed, manifest
from megabyte_jax.errors import NonFiniteError


def require_equal(state: Any, step: int) -> None:
    """Compares all copies bit for bit; all processes call this.

    A device that computes wrongly, or memory that does not keep what it is given, shows here long
    before it does in the loss.

    Args:
        state: tree of jax.Array.
        step: updates made, for the error.

    Raises:
        NonFiniteError: a copy differs; names the array and the devices.
    """
    own = [
        (name, place, shard.device.id, manifest.digest(shard.data))
        for name, x in manifest.named_arrays({"state": state})
        if _replicated(x)
        for shard in x.addressable_shards
        for place in [str(shard.index)]
    ]
    copies: dict[tuple[str, str], dict[int, str]] = {}
    for part in distributed.gather(own):
        for name, place, device, digest in part:
            copies.setdefault((name, place), {})[device] = digest
    for (name, _), by_device in copies.items():
        counts = Counter(by_device.values())
        if len(counts) > 1:
            (usual, often), *others = counts.most_common()
            known = often > others[0][1]
            odd = sorted(d for d, digest in by_device.items() if digest != usual or not known)
            raise NonFiniteError(
                f"update {step}: the copies of {name} on devices {sorted(by_device)} differ: "
                f"{'that' if known else 'those'} of {odd} cannot be trusted; nothing of it is "
                "saved, and run again it goes on from the last checkpoint, if need be without "
                "that device"
            )


def _replicated(x: jax.Array) -> bool:
    places = x.sharding.devices_indices_map(x.shape).values()
    return len(set(map(str, places))) < len(places)
