"""Any model as plain functions of its config and parameters, which is all that others know of it.

Decoding goes patch by patch (a patch of the baseline is one byte): `init_cache` or `prefill`, then
for each patch `begin_patch` once and `next_byte` P times.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.byte_transformer import ByteTransformer
from megabyte_jax.models.config import ByteTransformerConfig, MegabyteConfig, ModelConfig
from megabyte_jax.models.megabyte import Megabyte

Params = dict[str, Any]


_MODELS: dict[type, Any] = {MegabyteConfig: Megabyte, ByteTransformerConfig: ByteTransformer}


def _make(config: ModelConfig, key: jax.Array, *, stacked: bool = True) -> nnx.Module:
    return _MODELS[type(config)](config, rngs=nnx.Rngs(key), stacked=stacked)


@functools.cache
def _graph(config: ModelConfig, *, stacked: bool = True) -> nnx.GraphDef:
    make = functools.partial(_make, config, stacked=stacked)
    return nnx.graphdef(nnx.eval_shape(make, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Makes the parameters of a model.

    Args:
        config: the model.
        key: randomness of the initial weights.

    Returns:
        Nested dict of arrays of `param_dtype`, as `logits` and `nll` take them.
    """
    params = nnx.to_pure_dict(nnx.state(_make(config, key), nnx.Param))
    return jax.tree.map(lambda x: x.astype(config.param_dtype), params)


def logits(
    config: ModelConfig, params: Params, x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Logits of every byte given the bytes before it.

    Args:
        config: the model.
        params: its parameters.
        x: uint8 [B, T]; T a multiple of P and at most seq_len.
        key: randomness of the dropout; None turns dropout off.

    Returns:
        float32 [B, T, V].
    """
    return nnx.merge(_graph(config), params)(x, key)


def nll(
    config: ModelConfig, params: Params, x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Negative log-likelihood of every byte given the bytes before it.

    Args:
        config: the model.
        params: its parameters.
        x: uint8 [B, T]; T a multiple of P and at most seq_len.
        key: randomness of the dropout; None turns dropout off.

    Returns:
        float32 [B, T] in nats.
    """
    return nnx.merge(_graph(config), params).nll(x, key)


@functools.partial(jax.jit, static_argnums=0)
def unstack(config: ModelConfig, params: Params) -> Params:
    """Lays parameters out for decoding: each layer by itself, kernels in the computation's dtype.

    Args:
        config: the model.
        params: as `init_params` makes them.

    Returns:
        Nested dict of new arrays, as `begin_patch` and `next_byte` take them.
    """

    def layers(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "blocks" in tree:
            L = jax.tree.leaves(tree["blocks"])[0].shape[0]
            blocks = {i: jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(L)}
            tree = {**tree, "blocks": blocks}
        return {name: layers(value) for name, value in tree.items()}

    def cast(path: Any, x: jax.Array) -> jax.Array:
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
        return x.astype(config.dtype) if is_kernel else jnp.array(x)

    return jax.tree_util.tree_map_with_path(cast, layers(params))


def init_cache(config: ModelConfig, batch_size: int) -> Any:
    """What decoding remembers of B empty windows; see the model's `init_cache`."""
    return _MODELS[type(config)].init_cache(config, batch_size)


def prefill(config: ModelConfig, params: Params, x: jax.Array, num_patches: jax.Array) -> Any:
    """Reads the first patches of windows in parallel; see the model's `prefill`.

    Args:
        config: the model.
        params: as `init_params` makes them.
        x: uint8 [B, T]; T a multiple of P and at most seq_len.
        num_patches: int32 [B], how many patches of each are to be read.

    Returns:
        The cache.
    """
    return nnx.merge(_graph(config), params).prefill(x, num_patches)


def begin_patch(
    config: ModelConfig, unstacked: Params, cache: Any, x: jax.Array, k: jax.Array
) -> tuple[jax.Array, Any]:
    """Does what is done once per patch; see the model's `begin_patch`.

    Args:
        config: the model.
        unstacked: its parameters from `unstack`.
        cache: of the patches before.
        x: uint8 [B, T], the windows.
        k: int32 [B], the patch of each window that begins.

    Returns:
        [B, P, D] for `next_byte`, and the cache.
    """
    return nnx.merge(_graph(config, stacked=False), unstacked).begin_patch(cache, x, k)


def next_byte(
    config: ModelConfig,
    unstacked: Params,
    cache: Any,
    h: jax.Array,
    k: jax.Array,
    p: jax.Array,
    byte: jax.Array,
) -> tuple[jax.Array, Any]:
    """Predicts byte p of the patch that began; see the model's `next_byte`.

    Args:
        config: the model.
        unstacked: its parameters from `unstack`.
        cache: of the bytes before.
        h: [B, P, D] from `begin_patch`.
        k: int32 [B], the patch of each window.
        p: int32 [], the position in it.
        byte: uint8 [B], the byte before.

    Returns:
        float32 [B, V] logits, and the cache.
    """
    return nnx.merge(_graph(config, stacked=False), unstacked).next_byte(cache, h, k, p, byte)
