"""Causal attention inside groups of positions, and the choice of how it is computed.

The global model is one group of K patches; the local model is K groups of P bytes, each of which
may also see the last r positions of the group before it (cross-patch attention, section 2.3.2).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megabyte_jax.models.layers import shift
from megabyte_jax.sharding import axis_size, constrain, spec

# Scores of one group larger than this are never held whole: 2048 x 2048.
_MAX_SCORES = 2**22
_QUERY_BLOCK = 256
# What the TPU kernel takes: lengths of whole blocks, and the heads it was compiled for.
_FLASH_BLOCK = 128
_FLASH_HEADS = (64, 80, 96, 128)


def group_axes(G: int) -> tuple[str | None, ...]:
    """What the axes [B, G, T] mean: patches are the groups, or, in one group, its positions."""
    return ("batch", "patch", None) if G > 1 else ("batch", None, "patch")


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al., 2021), base 10,000, halves rotated together.

    Args:
        x: [..., T, H, d] queries or keys.
        positions: int [T], the position of each; only differences matter to attention.

    Returns:
        [..., T, H, d] in the dtype of x.
    """
    half = x.shape[-1] // 2
    # In float64, not in the program: an error here grows with the position.
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
    angles = jnp.outer(positions, frequencies)[:, None]  # [T, 1, d / 2]
    shape = (1,) * (x.ndim - 3) + angles.shape
    sin, cos = jnp.sin(angles).reshape(shape), jnp.cos(angles).reshape(shape)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def with_previous(x: jax.Array, previous: int, before: jax.Array | None = None) -> jax.Array:
    """Puts the last positions of each group before those of the next group.

    Args:
        x: [B, G, T, ...] groups of T positions.
        previous: how many positions r.
        before: [B, r, ...], what comes before group 0; None for zeros, which `attention` masks.

    Returns:
        [B, G, r + T, ...].
    """
    if not previous:
        return x
    first = 0 if before is None else before[:, None]
    return jnp.concatenate([shift(x[:, :, -previous:], first, axis=1), x], axis=2)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    banded: bool = False,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    first_exists: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, causal inside each group, with r = S - T positions of the group before.

    Query t of a group sees its keys up to t + r; in group 0 the first r keys do not exist unless
    `first_exists`, and a run of groups that follows another can so be computed by itself. With
    `banded` it sees only the last r of those: a window of r positions that slides over the groups.
    The softmax is in float32. Scores of a group that are too many to hold are computed in blocks
    and again in the backward pass, so that memory grows with S and not with T * S: on TPU by a
    kernel where it applies, else by plain JAX.

    Args:
        q: [B, G, T, H, d] queries.
        k: [B, G, S, N, d] keys of N <= H heads (each shared by H / N query heads).
        v: [B, G, S, N, d] values.
        banded: whether the first t + 1 keys are hidden from query t; needs r = T.
        dropout: probability of dropping an attention weight; needs `key`.
        key: randomness of the dropout; None turns it off.
        first_exists: bool [], whether the first r keys of group 0 exist; only where scores are few
            enough to hold. None if they do not.

    Returns:
        [B, G, T, H, d] in the dtype of q.
    """
    (B, G, T), S, d = q.shape[:3], k.shape[2], q.shape[-1]
    keep = 1.0 if key is None else 1.0 - dropout
    if T * S <= _MAX_SCORES or first_exists is not None:
        return _attend(q, k, v, jnp.arange(T), S - T, banded, key, keep, first_exists)
    in_blocks = functools.partial(_attend_in_blocks, banded=banded, key=key, keep=keep)
    rows, block = axis_size("data") * axis_size("fsdp"), _FLASH_BLOCK * axis_size("sequence")
    splits = B % rows == 0 and T % block == 0
    if G == 1 and T == S and keep == 1 and splits and d in _FLASH_HEADS:
        # Decided when lowered, so that a program for a TPU can be compiled where there is none.
        return jax.lax.platform_dependent(q, k, v, tpu=_flash, default=in_blocks)
    return in_blocks(q, k, v)


def _attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    banded: bool,
    key: jax.Array | None,
    keep: float,
) -> jax.Array:
    """Attends from blocks of queries, one after another, each recomputed in the backward pass."""
    (B, G, T, H, d), S = q.shape, k.shape[2]
    attend = jax.checkpoint(_attend, static_argnums=(4, 5, 7))
    # The positions of one group are split over `shards` devices: a block has some of each.
    shards = axis_size("sequence") if G == 1 and T % axis_size("sequence") == 0 else 1
    size = min(-(-_QUERY_BLOCK // shards), T // shards)
    rows = jnp.arange(T).reshape(shards, -1)
    missing = -rows.shape[1] % size
    q = q.reshape(B, G, *rows.shape, H, d)
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, missing)] + [(0, 0)] * 2)
    rows = jnp.pad(rows, [(0, 0), (0, missing)])  # what the first position sees is there always
    q = jnp.moveaxis(q.reshape(B, G, shards, -1, size, H, d), 3, 0)
    rows = jnp.moveaxis(rows.reshape(shards, -1, size), 1, 0)  # [T / block, shards, size]

    def one(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, part, rows = block
        block_key = None if key is None else jax.random.fold_in(key, number)
        part = constrain(part.reshape(B, G, -1, H, d), *group_axes(G), "heads", None)
        out = attend(part, k, v, rows.reshape(-1), S - T, banded, block_key, keep)
        return out.reshape(B, G, shards, size, H, d)

    out = jax.lax.map(one, (jnp.arange(len(rows)), q, rows))
    out = jnp.moveaxis(out, 0, 3).reshape(B, G, shards, -1, H, d)
    return out[:, :, :, : T // shards].reshape(B, G, T, H, d)


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """JAX's own TPU kernel, which skips what the causal mask hides; one group, no dropout."""
    # Here and not above: only a model of long sequences needs Pallas.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q.shape[2:4]
    # The compiler cannot split the kernel, so each device is told which queries and heads are its.
    queries, keys = spec(*group_axes(1), "heads", None), spec("batch", None, None, "heads", None)
    heads, rows = axis_size("tensor"), axis_size("sequence")
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * H),
        head_shards=heads,
        q_seq_shards=rows,
        interpret=interpret,
    )

    def one(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        B, G, T, H, d = q.shape

        def heads_first(x: jax.Array) -> jax.Array:  # [B * G, H, T, d]
            x = jnp.repeat(x, H // x.shape[3], axis=3)
            return jnp.moveaxis(x, 3, 2).reshape(B * G, H, -1, d)

        out = jax.vmap(attend)(heads_first(q * d**-0.5), heads_first(k), heads_first(v))
        return jnp.moveaxis(out.reshape(B, G, H, T, d), 2, 3)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return one(attend, q, k, v)
    place = attend.manual_sharding_spec(jax.sharding.NamedSharding(mesh, spec("heads", "patch")))
    split = jax.shard_map(
        one, in_specs=(place, queries, keys, keys), out_specs=queries, check_vma=False
    )
    return split(attend, q, k, v)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    previous: int,
    banded: bool,
    key: jax.Array | None,
    keep: float,
    first_exists: jax.Array | None = None,
) -> jax.Array:
    """Attends from the queries at positions `rows` of their group to all keys it may see."""
    B, G, T, H, d = q.shape
    S, N = k.shape[2], k.shape[3]
    q = q.reshape(B, G, T, N, H // N, d)
    scores = jnp.einsum("bgtnhd,bgsnd->bgnhts", q, k, preferred_element_type=jnp.float32)
    columns = jnp.arange(S)
    mask = columns[None, :] <= rows[:, None] + previous
    if banded:
        mask &= columns[None, :] > rows[:, None]
    if previous:
        has_previous = jnp.arange(G)[:, None] > 0
        if first_exists is not None:
            has_previous |= first_exists
        exists = (columns[None, :] >= previous) | has_previous  # [G, S]
        mask = (mask[None] & exists[:, None])[:, None, None]  # [G, 1, 1, T, S]
    mask = mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape)
    weights = jax.nn.softmax(jnp.where(mask, scores * d**-0.5, -jnp.inf), axis=-1)
    if key is not None and keep < 1:
        weights = jnp.where(jax.random.bernoulli(key, keep, weights.shape), weights / keep, 0.0)
    out = jnp.einsum("bgnhts,bgsnd->bgtnhd", weights.astype(v.dtype), v)
    return out.reshape(B, G, T, H, d)


class KV(NamedTuple):
    """Keys and values of one layer, kept to decode with.

    Batch and heads are one axis, as the products with them want it: with two, XLA for CPU copies
    the whole cache at every step.

    Attributes:
        k: [B * N, S, d] keys, rotated if the layer has rotary positions.
        v: [B * N, S, d] values.
    """

    k: jax.Array
    v: jax.Array


def attend_cached(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: KV, slot: jax.Array, seen: jax.Array
) -> tuple[jax.Array, KV]:
    """Attends from one position of each sequence to the positions kept, its own among them.

    Args:
        q: [B, H, d] queries.
        k: [B, N, d] keys of the same positions.
        v: [B, N, d] their values.
        cache: of S positions.
        slot: int32 [B], where k and v go in the cache.
        seen: bool [B, S], which slots each sequence sees, `slot` among them.

    Returns:
        [B, H, d] in the dtype of q, and the cache with k and v.
    """
    B, H, d = q.shape
    N = k.shape[1]
    row, slot = jnp.arange(B * N), jnp.repeat(slot, N)
    keys = cache.k.at[row, slot].set(k.reshape(B * N, d))
    values = cache.v.at[row, slot].set(v.reshape(B * N, d))
    q = q.reshape(B * N, H // N, d)
    scores = jnp.einsum("bhd,bsd->bhs", q, keys, preferred_element_type=jnp.float32)
    mask = jnp.repeat(seen, N, axis=0)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores * d**-0.5, -jnp.inf), axis=-1)
    out = jnp.einsum("bhs,bsd->bhd", weights.astype(v.dtype), values)
    return out.reshape(B, H, d), KV(keys, values)
