"""MEGABYTE: the global model over patches and the local model inside each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.attention import KV, rope
from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig
from megabyte_jax.models.layers import LayerMaker, cross_entropy, embed, tied_logits
from megabyte_jax.models.patch_embedder import PatchEmbedder
from megabyte_jax.models.transformer import Before, Cache, Step, Transformer, init_cache
from megabyte_jax.sharding import constrain


class MegabyteCache(NamedTuple):
    """What decoding remembers of a window.

    Attributes:
        global_model: keys and values of K patches.
        local_model: of r + P bytes: the last r of the patch before, then those of this patch.
    """

    global_model: Cache
    local_model: Cache


class Megabyte(nnx.Module):
    """The model of section 2, equations 1 to 6 and figure 2.

    Every byte value is trained and predicted: the pads of the global and of the local model are
    parameters of their own, not byte values.
    """

    def __init__(self, config: MegabyteConfig, *, rngs: nnx.Rngs, stacked: bool = True) -> None:
        """Makes the parameters, float32, from `rngs`; `stacked` as in `LayerMaker`."""
        D_L, P = config.local_model.dim, config.patch_size
        make = LayerMaker(config.init, config.dtype, rngs, stacked)
        self.config = config
        self.patch_embedder = PatchEmbedder(config, make)
        self.global_model = Transformer(config.global_model, 0, make)
        self.global_to_local = make.stream_linear(config.byte_dim, D_L, bias=False)  # w_GL
        self.byte_embedding = make.byte_table(VOCAB_SIZE, D_L)  # E_loc, and the tied head
        self.pad = make.vectors(D_L)  # E_lpad
        if config.local_positions:
            self.position_embedding = make.vectors(P, D_L)
        self.local_model = Transformer(config.local_model, config.previous, make)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Predicts every byte from the bytes before it.

        Args:
            x: uint8 [B, T] bytes; T a multiple of P and at most seq_len.
            key: randomness of the dropout; None turns dropout off.

        Returns:
            float32 [B, T, V] logits; those at t depend on the bytes before t alone.
        """
        global_key, local_key = (None, None) if key is None else jax.random.split(key)
        h, patches = self._global(x, global_key), self._patches(x)
        h = self.local_model(self._local_inputs(h, patches), local_key)  # [B, K, P, D_L]
        return tied_logits(h, self.byte_embedding, self.config.init).reshape(*x.shape, VOCAB_SIZE)

    def nll(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Negative log-likelihood of every byte given the bytes before it.

        The local model and the loss take `group_size` patches at a time and keep nothing of them
        for the backward pass, which computes them again. Cross-patch attention sees the group
        before through the keys and values of its last r bytes, which every layer hands on, so the
        result is that of all patches at once.

        Args:
            x: uint8 [B, T] bytes; T a multiple of P and at most seq_len.
            key: randomness of the dropout; None turns dropout off.

        Returns:
            float32 [B, T] in nats.
        """
        (B, T), G = x.shape, self.config.group_size
        patches = self._patches(x)
        K = patches.shape[1]
        if not G or K <= G or K % G:  # x is shorter than what the groups are for
            return cross_entropy(self(x, key), x)
        global_key, local_key = (None, None) if key is None else jax.random.split(key)
        h = self._global(x, global_key)

        def group(before: Before, part: Any) -> tuple[Before, jax.Array]:
            h, patches, key = part
            h, patches = (constrain(a, "batch", "patch", None) for a in (h, patches))
            inputs = self._local_inputs(h, patches)
            y, before = self.local_model.follow(inputs, before, key)
            logits = tied_logits(y, self.byte_embedding, self.config.init)
            return before, constrain(cross_entropy(logits, patches), "batch", "patch", None)

        group = jax.checkpoint(group, prevent_cse=False)
        keys = None if local_key is None else jax.random.split(local_key, K // G)
        parts = _deal(h, G), _deal(patches, G), keys
        _, losses = jax.lax.scan(group, self.local_model.nothing_before(B), parts)
        return _collect(losses).reshape(B, T)

    def _global(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """uint8 [B, T] -> [B, K, P * D_G], what the global model tells each patch."""
        return self.global_model(self.patch_embedder(x)[:, None], key)[:, 0]

    def _patches(self, x: jax.Array) -> jax.Array:
        """uint8 [B, T] -> [B, K, P]."""
        return x.reshape(x.shape[0], -1, self.config.patch_size)

    def _local_inputs(self, h: jax.Array, patches: jax.Array) -> jax.Array:
        """Adds to the global model's output the byte before, in a patch, or the pad (equation 4).

        [B, K, P * D_G] and uint8 [B, K, P] -> [B, K, P, D_L].
        """
        before = embed(self.byte_embedding, patches[..., :-1])
        pad = jnp.broadcast_to(self.pad[...], (*patches.shape[:2], 1, before.shape[-1]))
        before = jnp.concatenate([pad, before], axis=2)
        if self.config.local_positions:
            before = before + self.position_embedding[None, None]
        h = self.global_to_local(h.reshape(*patches.shape, -1))
        return constrain(h + before.astype(self.config.dtype), "batch", "patch", None, None)

    @staticmethod
    def init_cache(config: MegabyteConfig, batch_size: int) -> MegabyteCache:
        """The cache of an empty window for B sequences."""
        K = config.seq_len // config.patch_size
        slots = config.previous + config.patch_size
        return MegabyteCache(
            init_cache(config.global_model, batch_size, K, config.dtype),
            init_cache(config.local_model, batch_size, slots, config.dtype),
        )

    def prefill(self, x: jax.Array, num_patches: jax.Array) -> MegabyteCache:
        """Reads whole patches in parallel.

        Args:
            x: uint8 [B, T] bytes; T a multiple of P and at most seq_len.
            num_patches: int32 [B], how many patches of each sequence there are; what comes after
                them is not looked at.

        Returns:
            The cache as `begin_patch` would leave it, had each patch been decoded.
        """
        config, P, r = self.config, self.config.patch_size, self.config.previous
        h, global_kept = self.global_model.prefill(self.patch_embedder(x)[:, None])
        inputs = self._local_inputs(h[:, 0], self._patches(x))
        _, local_kept = self.local_model.prefill(inputs)
        last = jnp.maximum(num_patches - 1, 0)
        rows = jnp.arange(x.shape[0])
        missing = (config.seq_len - x.shape[1]) // P

        def global_slots(kept: jax.Array) -> jax.Array:  # [B, 1, T / P, N, d] -> [B * N, K, d]
            return _slots(kept[:, 0], after=missing)

        def local_slots(kept: jax.Array) -> jax.Array:  # [B, T / P, P, N, d] -> [B * N, r + P, d]
            return _slots(kept[rows, last], before=r)

        return MegabyteCache(
            tuple(KV(*map(global_slots, kv)) for kv in zip(*global_kept, strict=True)),
            tuple(KV(*map(local_slots, kv)) for kv in zip(*local_kept, strict=True)),
        )

    def begin_patch(
        self, cache: MegabyteCache, x: jax.Array, k: jax.Array
    ) -> tuple[jax.Array, MegabyteCache]:
        """Runs the global model on the patch before patch k, for each sequence its own.

        Args:
            cache: of the patches before k.
            x: uint8 [B, T], the window, whose bytes before k * P are looked at.
            k: int32 [B].

        Returns:
            [B, P, D_L], what the global model tells each byte of patch k, and the cache.
        """
        config, (B, P) = self.config, (x.shape[0], self.config.patch_size)
        slots = jnp.arange(config.seq_len // P)[None]
        at = Step(position=k, slot=k, seen=slots <= k[:, None])
        h, global_cache = self.global_model.step(self.patch_embedder.step(x, k), cache[0], at)
        local_cache = tuple(map(self._next_patch, cache.local_model))
        h = self.global_to_local(h.reshape(B, P, -1))
        return h, MegabyteCache(global_cache, local_cache)

    def _next_patch(self, kv: KV) -> KV:
        """Makes the last r bytes of a patch those before the next; what follows is overwritten."""
        r, P = self.config.previous, self.config.patch_size
        k, v = kv.k[:, P:], kv.v[:, P:]  # [B * N, r, d]
        if self.config.local_model.rope:
            k = rope(k[:, :, None], jnp.full(r, -P))[:, :, 0]
        return KV(
            jnp.concatenate([k, kv.k[:, r:]], axis=1), jnp.concatenate([v, kv.v[:, r:]], axis=1)
        )

    def next_byte(
        self, cache: MegabyteCache, h: jax.Array, k: jax.Array, p: jax.Array, byte: jax.Array
    ) -> tuple[jax.Array, MegabyteCache]:
        """Predicts byte p of patch k from the byte before it.

        Args:
            cache: of the bytes before.
            h: [B, P, D_L] from `begin_patch`.
            k: int32 [B].
            p: int32 [], the same for all sequences.
            byte: uint8 [B], byte p - 1 of the patch; not looked at if p is 0.

        Returns:
            float32 [B, V] logits, and the cache.
        """
        config, (B, r) = self.config, (h.shape[0], self.config.previous)
        before = jnp.where(p > 0, self.byte_embedding[byte], self.pad[...][None])
        if config.local_positions:
            before = before + self.position_embedding[p][None]
        h = jax.lax.dynamic_index_in_dim(h, p, 1, keepdims=False) + before.astype(config.dtype)
        slots = jnp.arange(r + config.patch_size)[None]
        seen = (slots <= r + p) & ((slots >= r) | (k > 0)[:, None])
        at = Step(position=jnp.full(B, p), slot=jnp.full(B, r + p), seen=seen)
        h, local_cache = self.local_model.step(h, cache.local_model, at)
        logits = tied_logits(h, self.byte_embedding, config.init)
        return logits, cache._replace(local_model=local_cache)


def _deal(x: jax.Array, G: int) -> jax.Array:
    """Cuts patches into groups: [B, K, ...] -> [K / G, B, G, ...].

    On a mesh whole groups lie on a device; now each lies on all, which so work at the same time.
    """
    x = x.reshape(x.shape[0], -1, G, *x.shape[2:])
    rest = [None] * (x.ndim - 3)
    x = constrain(x, "batch", "patch", None, *rest)
    return jnp.moveaxis(constrain(x, "batch", None, "patch", *rest), 1, 0)


def _collect(x: jax.Array) -> jax.Array:
    """Undoes `_deal`: [K / G, B, G, P] -> [B, K / G, G, P]."""
    return constrain(jnp.moveaxis(x, 0, 1), "batch", "patch", None, None)


def _slots(kept: jax.Array, *, before: int = 0, after: int = 0) -> jax.Array:
    """[B, S, N, d] -> [B * N, before + S + after, d], as `KV` has it."""
    padded = jnp.pad(jnp.moveaxis(kept, 2, 1), ((0, 0), (0, 0), (before, after), (0, 0)))
    return padded.reshape(-1, *padded.shape[2:])
