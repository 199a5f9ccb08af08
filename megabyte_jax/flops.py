"""What a model costs, by formula, and what this machine can do, by measurement."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megabyte_jax.models.config import (
    VOCAB_SIZE,
    ByteTransformerConfig,
    ModelConfig,
    TransformerConfig,
)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a model, as `functional.init_params` makes them."""
    if isinstance(config, ByteTransformerConfig):
        stack = config.transformer
        rows = VOCAB_SIZE + 1 + config.seq_len * config.byte_positions
        return _kernels(stack) + _vectors(stack) + rows * stack.dim
    P, D_G, D_L = config.patch_size, config.byte_dim, config.local_model.dim
    stacks = sum(_kernels(s) + _vectors(s) for s in (config.global_model, config.local_model))
    convolutions = sum(kernel * D_G**2 + D_G for kernel in config.conv_kernels)
    global_rows = VOCAB_SIZE + P + config.seq_len * config.byte_positions  # P of the pad
    local_rows = VOCAB_SIZE + 1 + P * config.local_positions
    return stacks + convolutions + global_rows * D_G + local_rows * D_L + D_G * D_L


def forward_flops_per_byte(config: ModelConfig) -> float:
    """FLOPs of the forward pass per byte of seq_len of them: its matrix products alone.

    A product of an m x n with an n x k matrix counts 2 m n k, and a masked score as a full one. Of
    MEGABYTE it is section 3 of the paper with the attention kept: 2 (m_g / P + m_l) and the
    scores. A window W is computed in groups of W bytes, each against 2 W keys.
    """
    T = config.seq_len
    if isinstance(config, ByteTransformerConfig):
        stack, W = config.transformer, config.window
        computed = -(-T // W) * W / T if W else 1  # positions per byte: the last group is filled up
        return computed * _per_position(stack, 2 * W or T) + 2 * stack.dim * VOCAB_SIZE
    P, D_G, D_L = config.patch_size, config.byte_dim, config.local_model.dim
    global_model = _per_position(config.global_model, T // P) / P
    local_model = _per_position(config.local_model, P + config.previous)
    convolutions = sum(2 * kernel * D_G**2 for kernel in config.conv_kernels)
    return global_model + local_model + convolutions + 2 * D_L * (D_G + VOCAB_SIZE)


def train_flops_per_byte(config: ModelConfig) -> float:
    """FLOPs of forward and backward pass per byte: three times the forward pass.

    What rematerialisation computes again is not counted, as usual for model FLOPs.
    """
    return 3 * forward_flops_per_byte(config)


class Read(NamedTuple):
    """Bytes of memory read per byte that is generated, at batch size 1.

    A batch shares the weights: B sequences together read weights + B * cache for a byte of each.

    Attributes:
        weights: parameters, as `functional.unstack` stores them.
        cache: keys and values.
    """

    weights: float
    cache: float


def read_per_generated_byte(config: ModelConfig) -> Read:
    """What the decoder's products read from memory for one byte; activations are left out.

    What is read once per patch counts 1 / P, as w_GL does. All slots of a cache are read, however
    full it is; of the tables of embeddings and positions the rows of the bytes at hand, but the
    whole of the one that is the head. Moving the last r bytes of a patch in the local cache, once
    per patch, reads another 1 / P of that cache and is left out too.
    """
    P, T = config.patch_size, config.seq_len
    width = jnp.dtype(config.dtype).itemsize
    if isinstance(config, ByteTransformerConfig):
        stack, D = config.transformer, config.transformer.dim
        rows = VOCAB_SIZE + 1 + config.byte_positions
        slots = config.window or T
        return Read(_stored(stack, width) + 4 * rows * D, slots * _slot(stack, width))
    global_model, local_model, r = config.global_model, config.local_model, config.previous
    D_G, D_L = config.byte_dim, local_model.dim
    reach = P + sum(kernel - 1 for kernel in config.conv_kernels)  # bytes a patch is made of
    global_rows = reach * (1 + config.byte_positions) + P + len(config.conv_kernels)
    kernels = D_G * D_L + sum(kernel * D_G**2 for kernel in config.conv_kernels)
    per_patch = _stored(global_model, width) + 4 * global_rows * D_G + width * kernels
    local_rows = VOCAB_SIZE + 1 + config.local_positions
    per_byte = _stored(local_model, width) + 4 * local_rows * D_L
    cache = T // P / P * _slot(global_model, width) + (r + P) * _slot(local_model, width)
    return Read(per_patch / P + per_byte, cache)


def _kernels(config: TransformerConfig) -> int:
    """Elements of the matrices of a stack."""
    attended, shared = _attention_widths(config)
    matrices = 3 if config.activation == "swiglu" else 2
    per_layer = 2 * (attended + shared) + matrices * config.hidden_dim
    return config.num_layers * config.dim * per_layer


def _vectors(config: TransformerConfig) -> int:
    """Elements of the biases and normalisations of a stack."""
    D, (attended, shared) = config.dim, _attention_widths(config)
    norm = D * (2 if config.bias and config.norm == "layernorm" else 1)
    hidden = config.hidden_dim * (2 if config.activation == "swiglu" else 1)
    biases = config.bias * (attended + 2 * shared + D + hidden + D)
    heads = config.qk_norm * 2 * config.head_width
    return config.num_layers * (2 * norm + biases + heads) + norm


def _attention_widths(config: TransformerConfig) -> tuple[int, int]:
    """Widths of all queries and of all keys of a position."""
    return config.num_heads * config.head_width, config.kv_heads * config.head_width


def _per_position(config: TransformerConfig, keys: int) -> float:
    """FLOPs of a stack per position that attends to `keys` positions."""
    return 2 * _kernels(config) + config.num_layers * 4 * keys * _attention_widths(config)[0]


def _stored(config: TransformerConfig, width: int) -> int:
    """Bytes of a stack, as `functional.unstack` lays it out for a computation of that width."""
    return width * _kernels(config) + 4 * _vectors(config)


def _slot(config: TransformerConfig, width: int) -> int:
    """Bytes of the keys and values of one position in all layers."""
    return config.num_layers * 2 * _attention_widths(config)[1] * width


def matmul_rate(dtype: str, seconds: float = 0.3) -> float:
    """Measures the fastest matrix products of this process's default device.

    Args:
        dtype: of the matrices.
        seconds: how long to measure.

    Returns:
        FLOP per second.
    """
    # An accelerator needs large products, several per launch, to show what it can do.
    size, repeats = (1024, 1) if jax.default_backend() == "cpu" else (4096, 16)
    a = jnp.full((size, size), 1 / size, dtype)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: y @ x, x))
    product = chain.lower(a).compile()
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - start))
    return best
