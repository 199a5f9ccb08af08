"""Wrong values inside a run, for child.py: NaN where an update computes, and flipped bits.

A batch of nothing but 255, which no text holds, tells the traced functions that it is their turn.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megabyte_jax.data import windows
from megabyte_jax.models import functional, megabyte


def _is_marked(x: jax.Array) -> jax.Array:
    return (x == 255).all()


def _mark(batch: int) -> None:
    rows = windows.TrainWindows.rows

    def marked(self: Any, step: int, first: int, count: int) -> Any:
        made = rows(self, step, first, count)
        return np.full_like(made, 255) if step == batch else made

    windows.TrainWindows.rows = marked  # type: ignore[method-assign]


def _embedding(batch: int, leaf: int) -> None:
    embed = megabyte.embed

    def broken(table: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(_is_marked(x), jnp.nan, embed(table, x))

    megabyte.embed = broken


def _activations(batch: int, leaf: int) -> None:
    forward = megabyte.Megabyte._global

    def broken(self: Any, x: jax.Array, key: Any) -> jax.Array:
        return jnp.where(_is_marked(x), jnp.nan, forward(self, x, key))

    megabyte.Megabyte._global = broken  # type: ignore[method-assign]


def _nll(add: Callable[[Any, jax.Array], jax.Array]) -> None:
    nll = functional.nll

    def broken(config: Any, params: Any, x: jax.Array, key: Any = None) -> jax.Array:
        return nll(config, params, x, key) + add(params, _is_marked(x))

    functional.nll = broken


def _loss(batch: int, leaf: int) -> None:
    _nll(lambda params, marked: jnp.where(marked, jnp.nan, 0.0))


def _gradient(batch: int, leaf: int) -> None:
    def add(params: Any, marked: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(params)
        inside = jnp.where(marked, 0.0 * leaves[leaf % len(leaves)].sum(), 1.0)
        return jnp.where(marked, jnp.sqrt(inside), 0.0)  # 0, whose derivative is not finite

    _nll(add)


def _state(change: Callable[[Any], Any], batch: int) -> None:
    """Changes the state that the update on a batch begins with."""
    call = jax.stages.Compiled.__call__

    def broken(self: Any, *args: Any) -> Any:
        if len(args) == 2 and int(args[0].step) == batch:  # others are compiled that are no update
            args = change(args[0]), args[1]
        return call(self, *args)

    jax.stages.Compiled.__call__ = broken  # type: ignore[method-assign]


def _poisoned(tree: Any, leaf: int) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    numbers = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    i = numbers[leaf % len(numbers)]
    leaves[i] = leaves[i].at[(-1,) * leaves[i].ndim].set(jnp.nan)
    return jax.tree.unflatten(structure, leaves)


def _params(batch: int, leaf: int) -> None:
    _state(lambda state: state._replace(params=_poisoned(state.params, leaf)), batch)


def _optimizer(batch: int, leaf: int) -> None:
    _state(lambda state: state._replace(opt_state=_poisoned(state.opt_state, leaf)), batch)


def flipped(tree: Any, seed: int) -> tuple[Any, str, int]:
    """Flips a bit of one device's copy of an array of float32.

    Returns:
        The tree, the name of the array and the device.
    """
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten_with_path(tree)
    i = int(random.choice([i for i, (_, x) in enumerate(leaves) if x.dtype == jnp.float32]))
    path, x = leaves[i]
    shards = [np.array(shard.data) for shard in x.addressable_shards]
    odd = int(random.integers(len(shards)))
    words = shards[odd].reshape(-1).view(np.uint32)
    words[random.integers(words.size)] ^= np.uint32(1 << int(random.integers(32)))
    pieces = [
        jax.device_put(data.reshape(shard.data.shape), shard.device)
        for data, shard in zip(shards, x.addressable_shards, strict=True)
    ]
    changed = jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)
    arrays = [changed if j == i else y for j, (_, y) in enumerate(leaves)]
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return jax.tree.unflatten(structure, arrays), name, x.addressable_shards[odd].device.id


def _flip(batch: int, seed: int) -> None:
    _state(lambda state: flipped(state, seed)[0], batch)


SITES = {
    "embedding": _embedding,
    "activations": _activations,
    "loss": _loss,
    "gradient": _gradient,
    "optimizer": _optimizer,
    "params": _params,
    "flip": _flip,
}
_OF_A_BATCH = ("embedding", "activations", "loss", "gradient")


def inject(site: str, batch: int, leaf: int) -> None:
    """Puts a value that is wrong where an update takes the `batch`-th batch, from 0."""
    if site in _OF_A_BATCH:
        _mark(batch)
    SITES[site](batch, leaf)
