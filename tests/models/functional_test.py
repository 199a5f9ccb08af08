import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig, TransformerConfig
from megabyte_jax.models.presets import BLOCKS
from tests.models import reference

CASES = 20  # of each model, of which there are ten
PAPER, MODERN = {**BLOCKS["paper"], "dropout": 0.0}, BLOCKS["modern"]


def megabyte(P, r, block, **fields):
    """Six patches; widths that P divides, grouped-query attention with the modern block."""
    grouped = {"num_heads": 4, "num_kv_heads": 2} if block is MODERN else {}
    return reference.tiny(
        {**block, **grouped},
        global_model={"dim": 8 * P, "head_dim": 6},
        local_model={"dim": 16, "head_dim": 4},
        seq_len=6 * P,
        patch_size=P,
        cross_patch=r,
        **fields,
    )


def baseline(window, block, **fields):
    stack = TransformerConfig(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, **block)
    return ByteTransformerConfig(
        seq_len=20, window=window, transformer=stack, dtype="float32", **fields
    )


MODELS = [
    megabyte(4, 4, PAPER),
    megabyte(4, 0, PAPER, init="scaled"),
    megabyte(4, 3, MODERN, byte_positions=False),
    megabyte(3, 3, MODERN, conv_kernels=(3, 5, 7)),
    megabyte(5, 2, PAPER, conv_kernels=(4,), local_positions=False),
    megabyte(8, 8, MODERN, init="scaled"),
    megabyte(1, 1, PAPER),
    megabyte(2, 1, {**PAPER, "rope": True}),
    baseline(0, PAPER),
    baseline(7, MODERN, byte_positions=False),
]


whole = jax.jit(functional.logits, static_argnums=0)
prefill = jax.jit(functional.prefill, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def began(config, params, cache, x, k):
    """What `begin_patch` makes of a cache: [B, P, D]."""
    return functional.begin_patch(config, functional.unstack(config, params), cache, x, k)[0]


@functools.partial(jax.jit, static_argnums=0)
def decoded(config, params, x, k):
    """Logits [K, P, B, V] of the patches from k on, each byte from those before it in x."""
    P, K = config.patch_size, config.seq_len // config.patch_size
    rows = jnp.arange(x.shape[0])
    unstacked = functional.unstack(config, params)

    def patch(carry, _):
        cache, k = carry
        h, cache = functional.begin_patch(config, unstacked, cache, x, k)

        def byte(cache, p):
            before = x[rows, k * P + p - 1]
            logits, cache = functional.next_byte(config, unstacked, cache, h, k, p, before)
            return cache, logits

        cache, logits = jax.lax.scan(byte, cache, jnp.arange(P))
        return (cache, k + 1), logits

    start = functional.prefill(config, params, x, k), k
    return jax.lax.scan(patch, start, length=K)[1]


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_decoding_gives_the_logits_of_the_whole_at_every_position(number):
    config, B = MODELS[number], number % 3 + 1
    P, K = config.patch_size, config.seq_len // config.patch_size
    rng = np.random.default_rng(number)
    for case in range(CASES):
        params = reference.random_params(config, case)
        x = rng.integers(0, 256, (B, config.seq_len), np.uint8)
        k = rng.integers(0, K, B, np.int32)  # patches of each prompt
        made = np.asarray(decoded(config, params, x, k))
        expected = np.asarray(whole(config, params, x)).reshape(B, K, P, 256)
        for row in range(B):
            left = K - k[row]
            np.testing.assert_allclose(
                made[:left, :, row], expected[row, k[row] :], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("config", [MODELS[0], MODELS[3], MODELS[9]], ids=["P=4", "conv", "window"])
def test_what_comes_after_the_prompt_leaves_no_trace_in_the_cache(config):
    """Of the patches that `prefill` is told of, and with no more of the sequence than those."""
    params, rng = reference.random_params(config), np.random.default_rng(0)
    P, T = config.patch_size, config.seq_len
    x = rng.integers(0, 256, (1, T), np.uint8)
    for k in (1, 5):
        later, there = x.copy(), jnp.array([k])
        later[:, k * P :] = rng.integers(0, 256, T - k * P)
        short = prefill(config, params, x[:, : k * P], there)
        expected = began(config, params, short, x, there)
        for cache in (prefill(config, params, y, there) for y in (x, later)):
            made = began(config, params, cache, later, there)
            np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [MODELS[0], MODELS[8]], ids=["megabyte", "baseline"])
def test_unstacked_parameters_are_the_same_numbers(config):
    params = reference.random_params(config)
    unstacked = functional.unstack(config, params)

    def total(tree):
        return sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))

    np.testing.assert_allclose(total(unstacked), total(params), rtol=1e-12)
    layers = jax.tree.leaves({k: v for k, v in unstacked.items() if "model" in k or "former" in k})
    assert all(leaf.ndim <= 2 for leaf in layers)


def test_kernels_alone_are_kept_in_the_dtype_of_the_computation():
    config = megabyte(4, 4, MODERN, dtype="bfloat16")
    shapes = jax.eval_shape(functools.partial(functional.unstack, config), reference.shapes(config))
    dtypes = {
        (path[-1].key == "kernel", str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    }
    assert dtypes == {(True, "bfloat16"), (False, "float32")}


def test_decoding_in_bfloat16_is_as_exact_as_the_whole():
    exact, config = MODELS[5], dataclasses.replace(MODELS[5], dtype="bfloat16")
    params, x = reference.random_params(config), reference.random_bytes(3, config.seq_len)
    expected = np.asarray(whole(exact, params, x))
    made = np.asarray(decoded(config, params, x, np.zeros(3, np.int32)))  # [K, P, B, V]
    made = np.moveaxis(made, 2, 0).reshape(expected.shape)
    error, usual = (np.abs(y - expected).mean() for y in (made, whole(config, params, x)))
    assert 0 < error < 1.5 * usual


@pytest.mark.parametrize("P", [1, 4])
@pytest.mark.parametrize("r", [0, 1])
def test_the_cache_of_an_empty_window_is_that_of_a_prompt_without_patches(P, r):
    config = megabyte(P, r, PAPER)
    read = jax.eval_shape(
        functools.partial(functional.prefill, config),
        reference.shapes(config),
        jax.ShapeDtypeStruct((3, 2 * P), np.uint8),
        jax.ShapeDtypeStruct((3,), np.int32),
    )
    empty = functional.init_cache(config, 3)
    assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, empty)
    assert not any(leaf.any() for leaf in jax.tree.leaves(empty))
