"""Pre-norm transformer blocks, stacked and scanned: both the global and the local model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.attention import (
    KV,
    attend_cached,
    attention,
    group_axes,
    rope,
    with_previous,
)
from megabyte_jax.models.config import TransformerConfig
from megabyte_jax.models.layers import LayerMaker
from megabyte_jax.sharding import constrain, gathered

Cache = tuple[KV, ...]  # of each layer

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops elements of x with probability `rate`; without a key nothing is dropped."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class Step(NamedTuple):
    """Where in their sequences, and in the cache, the positions of one decoding step are.

    Attributes:
        position: int32 [B], by which queries and keys are rotated.
        slot: int32 [B], where keys and values go in the cache.
        seen: bool [B, S], which slots each sequence sees.
    """

    position: jax.Array
    slot: jax.Array
    seen: jax.Array


class Before(NamedTuple):
    """The end of the groups that come before others, in each layer, for those to follow on.

    Attributes:
        k: [L, B, r, N, d] keys of the last r positions, not rotated.
        v: [L, B, r, N, d] their values.
        exists: bool [], whether there are groups before.
    """

    k: jax.Array
    v: jax.Array
    exists: jax.Array


class Kept(NamedTuple):
    """Keys and values of a layer, of which a caller asks for what it needs.

    Attributes:
        all: of every position [B, G, T, N, d], the keys rotated by the position in their group.
        last: of the last r positions of the last group [B, r, N, d], the keys not rotated.
    """

    all: tuple[jax.Array, jax.Array]
    last: tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Multi-head causal self-attention inside groups, see `attention.attention`."""

    def __init__(
        self, config: TransformerConfig, previous: int, banded: bool, make: LayerMaker
    ) -> None:
        """Takes the arguments of `Transformer`."""
        D, d, H, N = config.dim, config.head_width, config.num_heads, config.kv_heads
        bias, L = config.bias, config.num_layers
        self.config, self.previous, self.banded = config, previous, banded
        self.query = make.linear(D, H * d, bias=bias)
        self.key = make.linear(D, N * d, bias=bias)
        self.value = make.linear(D, N * d, bias=bias)
        self.out = make.stream_linear(H * d, D, bias=bias, num_layers=L)
        if config.qk_norm:
            self.query_norm, self.key_norm = make.rms_norm(d), make.rms_norm(d)

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., D] -> queries [..., H, d], keys and values [..., N, d], before rotation."""
        config = self.config
        q = self.query(x).reshape(*x.shape[:-1], config.num_heads, -1)
        k = self.key(x).reshape(*x.shape[:-1], config.kv_heads, -1)
        v = self.value(x).reshape(*x.shape[:-1], config.kv_heads, -1)
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def __call__(
        self, x: jax.Array, key: jax.Array | None, before: Before | None
    ) -> tuple[jax.Array, Kept]:
        """[B, G, T, D] -> the same, and what is kept of it; `key` drops weights."""
        config, r, (G, T) = self.config, self.previous, x.shape[1:3]
        q, k, v = self._project(x)
        q = constrain(q, *group_axes(G), "heads", None)
        last = k[:, -1, T - r :], v[:, -1, T - r :]
        if before:
            k, v = with_previous(k, r, before.k), with_previous(v, r, before.v)
        else:
            k, v = with_previous(k, r), with_previous(v, r)
        if config.rope:
            q, k = rope(q, jnp.arange(T)), rope(k, jnp.arange(-r, T))
        # One group, whose positions are split, is attended to whole: the global model's gather.
        across = group_axes(G) if G > 1 else ("batch", None, None)
        k, v = (constrain(part, *across, "heads", None) for part in (k, v))
        y = attention(
            q,
            k,
            v,
            banded=self.banded,
            dropout=config.dropout,
            key=key,
            first_exists=before.exists if before else None,
        )
        y = constrain(y, *group_axes(G), "heads", None)
        return self.out(y.reshape(*x.shape[:-1], -1)), Kept((k[:, :, r:], v[:, :, r:]), last)

    def step(self, x: jax.Array, cache: KV, at: Step) -> tuple[jax.Array, KV]:
        """[B, D] -> [B, D], and the cache with the keys and values of x."""
        q, k, v = self._project(x)
        if self.config.rope:
            q, k = rope(q, at.position), rope(k, at.position)
        y, cache = attend_cached(q, k, v, cache, at.slot, at.seen)
        return self.out(y.reshape(x.shape[0], -1)), cache


class FeedForward(nnx.Module):
    """Position-wise feed-forward layer, gated if the activation is swiglu."""

    def __init__(self, config: TransformerConfig, make: LayerMaker) -> None:
        """Takes the arguments of `Transformer`."""
        D, hidden, bias, L = config.dim, config.hidden_dim, config.bias, config.num_layers
        self.activation = config.activation
        self.up = make.linear(D, hidden, bias=bias)
        if config.activation == "swiglu":
            self.gate = make.linear(D, hidden, bias=bias)
        self.down = make.stream_linear(hidden, D, bias=bias, num_layers=L)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        h = self._split_hidden(self.up(x))
        match self.activation:
            case "relu":
                h = jax.nn.relu(h)
            case "relu2":
                h = jnp.square(jax.nn.relu(h))
            case "gelu":
                h = jax.nn.gelu(h)
            case "swiglu":
                h = jax.nn.silu(self._split_hidden(self.gate(x))) * h
        return self.down(h)

    def _split_hidden(self, h: jax.Array) -> jax.Array:
        """[B, G, T, hidden] as it is; of a decoding step, which has no groups, nothing is said."""
        return constrain(h, *group_axes(h.shape[1]), "mlp") if h.ndim == 4 else h


class Block(nnx.Module):
    """Attention and feed-forward, each normalised first and added to the residual stream."""

    def __init__(
        self, config: TransformerConfig, previous: int, banded: bool, make: LayerMaker
    ) -> None:
        """Takes the arguments of `Transformer`."""
        self.dropout = config.dropout
        self.attention_norm = make.norm(config)
        self.attention = Attention(config, previous, banded, make)
        self.mlp_norm = make.norm(config)
        self.mlp = FeedForward(config, make)

    def __call__(
        self, x: jax.Array, key: jax.Array | None, before: Before | None
    ) -> tuple[jax.Array, Kept]:
        """[B, G, T, D] -> the same, and keys and values; `key` is the randomness of the dropout."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        weights_key, attention_key, mlp_key = keys
        y, kept = self.attention(self.attention_norm(x), weights_key, before)
        x = x + dropped(y, self.dropout, attention_key)
        return x + dropped(self.mlp(self.mlp_norm(x)), self.dropout, mlp_key), kept

    def step(self, x: jax.Array, cache: KV, at: Step) -> tuple[jax.Array, KV]:
        """[B, D] -> [B, D], and the cache with the keys and values of x."""
        y, cache = self.attention.step(self.attention_norm(x), cache, at)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
    """A stack of blocks and a final normalisation.

    The blocks are one, whose weights have a leading axis L that a scan eats, or a list of L, if
    `LayerMaker.stacked` is not set: a decoder then need not cut each layer out at every step.
    """

    def __init__(
        self, config: TransformerConfig, previous: int, make: LayerMaker, *, banded: bool = False
    ) -> None:
        """Makes the stack.

        Args:
            config: its sizes and switches.
            previous: how many last positions r of the group before each group also sees.
            make: makes its layers.
            banded: whether a position sees the last r positions only, see `attention.attention`.
        """

        def block(key: jax.Array) -> Block:
            return Block(config, previous, banded, dataclasses.replace(make, rngs=nnx.Rngs(key)))

        self.config, self.dtype = config, make.dtype
        keys = jax.random.split(make.rngs(), config.num_layers)
        self.previous = previous
        self.blocks: Any = jax.vmap(block)(keys) if make.stacked else nnx.List(map(block, keys))
        self.norm = make.norm(config)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Runs the stack.

        Args:
            x: [B, G, T, D], G groups of T positions, causal inside each.
            key: randomness of the dropout; None turns dropout off.

        Returns:
            [B, G, T, D].
        """
        return self._run(x, key)[0]

    def follow(
        self, x: jax.Array, before: Before, key: jax.Array | None = None
    ) -> tuple[jax.Array, Before]:
        """Runs the stack on groups that follow others, which need not be at hand.

        Args:
            x: [B, G, T, D].
            before: the end of the groups before.
            key: randomness of the dropout; None turns dropout off.

        Returns:
            [B, G, T, D], and the end of these groups.
        """
        y, (k, v) = self._run(x, key, lambda kept: kept.last, before)
        return y, Before(k, v, exists=jnp.bool_(True))

    def nothing_before(self, batch_size: int) -> Before:
        """What the first groups of B sequences follow."""
        config, r = self.config, self.previous
        shape = config.num_layers, batch_size, r, config.kv_heads, config.head_width
        nothing = jnp.zeros(shape, self.dtype)
        return Before(nothing, nothing, jnp.bool_(False))

    def prefill(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Runs the stack and keeps keys and values.

        Args:
            x: [B, G, T, D].

        Returns:
            [B, G, T, D], and keys and values [L, B, G, T, N, d], the keys rotated by the position
            in their own group.
        """
        return self._run(x, None, lambda kept: kept.all)

    def _run(
        self,
        x: jax.Array,
        key: jax.Array | None,
        keep: Callable[[Kept], Any] = lambda kept: None,
        before: Before | None = None,
    ) -> tuple[jax.Array, Any]:
        def apply(x: jax.Array, layer: tuple[Block, Any, Any]) -> tuple[jax.Array, Any]:
            block, key, end = layer
            x = constrain(x, *group_axes(x.shape[1]), None)
            of_layer = before and Before(end[0], end[1], before.exists)
            x, kept = gathered(block, self.dtype)(x, key, of_layer)
            return constrain(x, *group_axes(x.shape[1]), None), keep(kept)

        if self.config.remat != "none":
            policy = _REMAT_POLICIES[self.config.remat]
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)
        L = self.config.num_layers
        keys = None if key is None else jax.random.split(key, L)
        unroll = min(self.config.scan_unroll, L)
        layers = self.blocks, keys, before and (before.k, before.v)
        x, kept = jax.lax.scan(apply, x, layers, unroll=unroll)
        return self.norm(x), kept

    def step(self, x: jax.Array, cache: Cache, at: Step) -> tuple[jax.Array, Cache]:
        """Runs the stack, made as a list of blocks, on one position of each sequence.

        Args:
            x: [B, D].
            cache: keys and values of each layer, of S positions.
            at: where the positions are.

        Returns:
            [B, D], and the cache with the keys and values of x.
        """
        caches = []
        for block, kv in zip(self.blocks, cache, strict=True):
            x, kv = block.step(x, kv, at)
            caches.append(kv)
        return self.norm(x), tuple(caches)


def init_cache(config: TransformerConfig, batch_size: int, slots: int, dtype: str) -> Cache:
    """The cache of a stack that holds nothing yet.

    Args:
        config: of the stack.
        batch_size: B.
        slots: S, positions it can hold.
        dtype: of the computation.

    Returns:
        Of each layer keys and values [B * N, S, d], zero.
    """
    shape = batch_size * config.kv_heads, slots, config.head_width
    return tuple(
        KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )
