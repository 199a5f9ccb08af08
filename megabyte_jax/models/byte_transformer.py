"""The baseline that MEGABYTE is measured against: one transformer over bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.attention import KV, rope
from megabyte_jax.models.config import VOCAB_SIZE, ByteTransformerConfig
from megabyte_jax.models.layers import LayerMaker, cross_entropy, embed, shift, tied_logits
from megabyte_jax.models.transformer import Cache, Step, Transformer, init_cache


class ByteTransformer(nnx.Module):
    """A decoder over bytes with a trainable pad before the first, and a tied head.

    With a window W, the bytes are cut into groups of W, each of which sees the one before it: so
    the cost of a byte does not grow with the sequence.
    """

    def __init__(
        self, config: ByteTransformerConfig, *, rngs: nnx.Rngs, stacked: bool = True
    ) -> None:
        """Makes the parameters, float32, from `rngs`; `stacked` as in `LayerMaker`."""
        D = config.transformer.dim
        make = LayerMaker(config.init, config.dtype, rngs, stacked)
        self.config = config
        self.byte_embedding = make.byte_table(VOCAB_SIZE, D)
        self.pad = make.vectors(D)
        if config.byte_positions:
            self.position_embedding = make.vectors(config.seq_len, D)
        self.transformer = Transformer(
            config.transformer, config.window, make, banded=bool(config.window)
        )

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Predicts every byte from the bytes before it.

        Args:
            x: uint8 [B, T] bytes; T at most seq_len.
            key: randomness of the dropout; None turns dropout off.

        Returns:
            float32 [B, T, V] logits; those at t depend on the bytes before t alone.
        """
        h = self.transformer(self._groups(x), key)
        h = h.reshape(x.shape[0], -1, h.shape[-1])[:, : x.shape[1]]
        return tied_logits(h, self.byte_embedding, self.config.init)

    def nll(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Negative log-likelihood of every byte, of the arguments of a call: float32 [B, T]."""
        return cross_entropy(self(x, key), x)

    def _groups(self, x: jax.Array) -> jax.Array:
        """Embeds the byte before each byte: uint8 [B, T] -> [B, G, T / G, D], padded at the end."""
        B, T = x.shape
        h = shift(embed(self.byte_embedding, x), self.pad[...][None, None], axis=1)
        if self.config.byte_positions:
            h = h + self.position_embedding[None, :T]
        W = self.config.window or T
        h = jnp.pad(h, ((0, 0), (0, -T % W), (0, 0))).astype(self.config.dtype)
        return h.reshape(B, -1, W, h.shape[-1])

    @staticmethod
    def init_cache(config: ByteTransformerConfig, batch_size: int) -> Cache:
        """The cache of an empty window for B sequences."""
        slots = config.window or config.seq_len
        return init_cache(config.transformer, batch_size, slots, config.dtype)

    def prefill(self, x: jax.Array, num_patches: jax.Array) -> Cache:
        """Reads bytes in parallel.

        Args:
            x: uint8 [B, T] bytes; T at most seq_len.
            num_patches: int32 [B], how many bytes of each sequence there are; what comes after
                them is not looked at.

        Returns:
            The cache as `begin_patch` would leave it, had each byte been decoded.
        """
        config, B = self.config, x.shape[0]
        S = config.window or config.seq_len
        _, kept = self.transformer.prefill(self._groups(x))
        # Slot s holds the last of the bytes s, s + S, s + 2 S, ... that there are.
        slot = jnp.arange(S)[None]
        held = slot + (num_patches[:, None] - 1 - slot) // S * S  # [B, S]

        def slots(kept: jax.Array) -> jax.Array:  # [B, G, T / G, N, d] -> [B * N, S, d]
            kept = kept.reshape(B, -1, *kept.shape[3:])
            index = jnp.clip(held, 0, kept.shape[1] - 1)[:, :, None, None]
            kept = jnp.take_along_axis(kept, index, axis=1)
            return jnp.moveaxis(kept, 2, 1).reshape(-1, S, kept.shape[-1])

        def from_start(k: jax.Array) -> jax.Array:  # rotated by the position in the group so far
            starts = jnp.repeat(jnp.arange(k.shape[1]) * k.shape[2], k.shape[2])
            return rope(k.reshape(B, -1, *k.shape[3:]), starts).reshape(k.shape)

        keys, values = kept
        if config.window and config.transformer.rope:
            keys = jax.vmap(from_start)(keys)
        return tuple(KV(slots(k), slots(v)) for k, v in zip(keys, values, strict=True))

    def begin_patch(self, cache: Cache, x: jax.Array, k: jax.Array) -> tuple[jax.Array, Cache]:
        """Runs the model on the byte before byte k, for each sequence its own.

        Args:
            cache: of the bytes before.
            x: uint8 [B, T], the window, whose byte k - 1 is looked at.
            k: int32 [B].

        Returns:
            [B, 1, D], and the cache.
        """
        config = self.config
        byte = jnp.take_along_axis(x, jnp.maximum(k - 1, 0)[:, None], axis=1)[:, 0]
        h = jnp.where((k > 0)[:, None], self.byte_embedding[byte], self.pad[...][None])
        if config.byte_positions:
            h = h + self.position_embedding[k]
        S = config.window or config.seq_len
        seen = jnp.arange(S)[None] <= k[:, None]
        at = Step(position=k, slot=k % S, seen=seen)
        h, cache = self.transformer.step(h.astype(config.dtype), cache, at)
        return h[:, None], cache

    def next_byte(
        self, cache: Cache, h: jax.Array, k: jax.Array, p: jax.Array, byte: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Predicts byte k, as `Megabyte.next_byte` with patches of one byte.

        Args:
            cache: of the bytes before, left as it is.
            h: [B, 1, D] from `begin_patch`, which did the work.
            k: int32 [B], not looked at.
            p: int32 [], 0.
            byte: uint8 [B], not looked at.

        Returns:
            float32 [B, V] logits, and the cache.
        """
        return tied_logits(h[:, 0], self.byte_embedding, self.config.init), cache
