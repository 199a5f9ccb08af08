"""What a model costs, by formula, and what this machine can do, by measurement."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig, TransformerConfig


def forward_flops_per_byte(config: MegabyteConfig) -> float:
    """FLOPs of the forward pass per byte at full context: its matrix products alone.

    A product of an m x n with an n x k matrix counts 2 m n k, a masked score as a full one. It is
    section 3 of the paper with the attention kept: 2 (m_g / P + m_l) and the scores.
    """
    P, K = config.patch_size, config.seq_len // config.patch_size
    D_G, D_L = config.byte_dim, config.local_model.dim
    global_model = _per_position(config.global_model, K) / P
    local_model = _per_position(config.local_model, P + config.previous)
    convolutions = sum(2 * kernel * D_G**2 for kernel in config.conv_kernels)
    return global_model + local_model + convolutions + 2 * D_L * (D_G + VOCAB_SIZE)


def train_flops_per_byte(config: MegabyteConfig) -> float:
    """FLOPs of forward and backward pass per byte: three times the forward pass.

    What rematerialisation computes again is not counted, as usual for model FLOPs.
    """
    return 3 * forward_flops_per_byte(config)


def _per_position(config: TransformerConfig, keys: int) -> float:
    """FLOPs of a stack per position that attends to `keys` positions."""
    D, attended, shared = (
        config.dim,
        config.num_heads * config.head_width,
        config.kv_heads * config.head_width,
    )
    matrices = 3 if config.activation == "swiglu" else 2
    weights = 2 * D * (attended + shared) + matrices * D * config.hidden_dim
    return config.num_layers * (2 * weights + 4 * keys * attended)


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
