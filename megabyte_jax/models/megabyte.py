"""MEGABYTE: the global model over patches, the local model inside each, and plain functions."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig
from megabyte_jax.models.layers import STREAM_SCALE, LayerMaker
from megabyte_jax.models.patch_embedder import PatchEmbedder
from megabyte_jax.models.transformer import Transformer

Params = dict[str, Any]


class Megabyte(nnx.Module):
    """The model of section 2, equations 1 to 6 and figure 2.

    Every byte value is trained and predicted: the pads of the global and of the local model are
    parameters of their own, not byte values.
    """

    def __init__(self, config: MegabyteConfig, *, rngs: nnx.Rngs) -> None:
        """Makes the parameters, float32, from `rngs`."""
        D_L, P = config.local_model.dim, config.patch_size
        make = LayerMaker(config.init, config.dtype, rngs)
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
        config, (B, T) = self.config, x.shape
        P = config.patch_size
        global_key, local_key = (None, None) if key is None else jax.random.split(key)

        h = self.patch_embedder(x)  # [B, K, P * D_G]
        h = self.global_model(h[:, None], global_key)
        h = self.global_to_local(h.reshape(B, T // P, P, -1))  # [B, K, P, D_L]

        h = self.local_model(h + self._local_inputs(x), local_key)  # [B, K, P, D_L]
        head = self.byte_embedding[...].astype(h.dtype)
        logits = jnp.einsum("bkpd,vd->bkpv", h, head, preferred_element_type=jnp.float32)
        if config.init == "scaled":
            logits = logits / (STREAM_SCALE * math.sqrt(h.shape[-1]))
        return logits.reshape(B, T, VOCAB_SIZE)

    def _local_inputs(self, x: jax.Array) -> jax.Array:
        """Embeds the byte before each byte of a patch, the pad before the first (equation 4).

        uint8 [B, T] -> [B, K, P, D_L].
        """
        patches = x.reshape(x.shape[0], -1, self.config.patch_size)
        h = self.byte_embedding[patches[..., :-1]]
        pad = jnp.broadcast_to(self.pad[...], (*patches.shape[:2], 1, h.shape[-1]))
        h = jnp.concatenate([pad, h], axis=2)
        if self.config.local_positions:
            h = h + self.position_embedding[None, None]
        return h.astype(self.config.dtype)


@functools.cache
def _graph(config: MegabyteConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Megabyte(config, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: MegabyteConfig, key: jax.Array) -> Params:
    """Makes the parameters of a model.

    Args:
        config: the model.
        key: randomness of the initial weights.

    Returns:
        Nested dict of float32 arrays, as `logits` and `nll` take them.
    """
    return nnx.to_pure_dict(nnx.state(Megabyte(config, rngs=nnx.Rngs(key)), nnx.Param))


def logits(
    config: MegabyteConfig, params: Params, x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Logits of every byte given the bytes before it, see `Megabyte.__call__`.

    Args:
        config: the model.
        params: its parameters.
        x: uint8 [B, T].
        key: randomness of the dropout; None turns dropout off.

    Returns:
        float32 [B, T, V].
    """
    return nnx.merge(_graph(config), params)(x, key)


def nll(
    config: MegabyteConfig, params: Params, x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Negative log-likelihood of every byte given the bytes before it.

    Args:
        config: the model.
        params: its parameters.
        x: uint8 [B, T].
        key: randomness of the dropout; None turns dropout off.

    Returns:
        float32 [B, T] in nats.
    """
    predicted = logits(config, params, x, key)
    return optax.softmax_cross_entropy_with_integer_labels(predicted, x.astype(jnp.int32))
