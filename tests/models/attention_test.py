import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax import sharding
from megabyte_jax.models import attention as module
from megabyte_jax.models.attention import attention, rope, with_previous

B, G, T, H, N, D = 2, 3, 8, 6, 2, 5


def inputs(r, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, G, T, H, D), (B, G, T + r, N, D), (B, G, T + r, N, D)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def one_by_one(q, k, v, banded=False):
    """The definition, in float64: each query of each head over the keys it may see."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    r, out = k.shape[2] - T, np.zeros(q.shape)
    for b, g, t, h in np.ndindex(B, G, T, H):
        first = t + 1 if banded else 0
        seen, n = slice(first if g else max(first, r), r + t + 1), h * N // H
        weights = np.exp(k[b, g, seen, n] @ q[b, g, t, h] / np.sqrt(D))
        out[b, g, t, h] = weights / weights.sum() @ v[b, g, seen, n]
    return out


@pytest.mark.parametrize("r", [0, 3, T])
def test_attention_is_its_definition(r):
    q, k, v = inputs(r)
    np.testing.assert_allclose(attention(q, k, v), one_by_one(q, k, v), atol=1e-5)


def test_in_a_band_a_query_sees_as_many_keys_as_a_group_has_and_no_more():
    q, k, v = inputs(T)
    got = attention(q, k, v, banded=True)
    np.testing.assert_allclose(got, one_by_one(q, k, v, banded=True), atol=1e-5)
    k[:, 1, :3], v[:, 1, :3] = 1e3, -1e3  # which queries from the third on are not to see
    other = attention(q, k, v, banded=True)
    np.testing.assert_array_equal(other[:, 1, 2:], got[:, 1, 2:])
    assert np.all(other[:, 1, :2] != got[:, 1, :2])


def test_the_first_group_never_sees_what_stands_before_it():
    q, k, v = inputs(3)
    k[:, 0, :3], v[:, 0, :3] = 1e3, -1e3
    alone = attention(q[:, :1], k[:, :1, 3:], v[:, :1, 3:])
    np.testing.assert_allclose(attention(q, k, v)[:, :1], alone, atol=1e-6)


def value_and_gradients(q, k, v, banded):
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    value, backward = jax.vjp(functools.partial(attention, banded=banded), q, k, v)
    return value, *backward(weights)


@pytest.mark.parametrize(
    ("r", "block", "banded"),
    [(0, 2, False), (3, 2, False), (3, 5, False), (T, 2, True), (T, 5, True)],
)
def test_blocks_of_queries_give_the_same_values_and_gradients(r, block, banded, monkeypatch):
    direct = value_and_gradients(*inputs(r), banded)
    monkeypatch.setattr(module, "_MAX_SCORES", T * (T + r) - 1)
    monkeypatch.setattr(module, "_QUERY_BLOCK", block)
    assert "scan" in str(jax.make_jaxpr(attention)(*inputs(r)))
    for a, b in zip(direct, value_and_gradients(*inputs(r), banded), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_of_queries_need_less_memory_than_all_scores(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 1, 1024, 2, 4), jnp.float32)

    def memory():
        step = jax.jit(jax.grad(lambda q: attention(q, q, q).sum()))
        return step.lower(q).compile().memory_analysis().temp_size_in_bytes

    direct = memory()
    monkeypatch.setattr(module, "_MAX_SCORES", 2**18)
    assert memory() < direct / 2


@pytest.mark.parametrize("block", [T, 2])
def test_dropout_follows_its_key_and_keeps_the_mean(block, monkeypatch):
    monkeypatch.setattr(module, "_MAX_SCORES", T * T if block == T else 0)
    monkeypatch.setattr(module, "_QUERY_BLOCK", block)
    q, k, v = inputs(0)
    drop = jax.jit(lambda key: attention(q, k, v, dropout=0.4, key=key))
    first, again, other = (drop(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.5
    mean = jax.lax.map(drop, jax.random.split(jax.random.key(3), 2000)).mean(0)
    np.testing.assert_allclose(mean, one_by_one(q, k, v), atol=0.15)


def test_dropout_drops_other_weights_in_every_block_of_queries(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SCORES", 0)
    monkeypatch.setattr(module, "_QUERY_BLOCK", 4)
    zeros, one_hot = np.zeros((1, 1, 16, 1, 16), np.float32), np.eye(16, dtype=np.float32)
    v = one_hot.reshape(1, 1, 16, 1, 16)  # so that the output is the weights themselves
    weights = attention(zeros, zeros, v, dropout=0.5, key=jax.random.key(0))[0, 0, :, 0]
    blocks = np.asarray(weights > 0).reshape(4, 4, 16)[1:, :, :4]  # the keys that all may see
    assert len({block.tobytes() for block in blocks}) == 3


def test_without_a_key_nothing_is_dropped():
    q, k, v = inputs(3)
    np.testing.assert_array_equal(attention(q, k, v, dropout=0.9), attention(q, k, v))


def test_bfloat16_stays_bfloat16_and_is_close():
    exact = inputs(3)
    out = attention(*(jnp.asarray(a, jnp.bfloat16) for a in exact))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), one_by_one(*exact), atol=0.05)


def test_rope_turns_each_pair_by_its_position_and_keeps_its_length():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    positions = np.array([-2, 0, 5])
    angles = positions[:, None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, None]
    got = rope(jnp.asarray(x), positions)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 6)).astype(np.float32)

    def score(a, b):
        return jnp.vdot(rope(q, jnp.array([a])), rope(k, jnp.array([b])))

    np.testing.assert_allclose(score(3, 1), score(103, 101), atol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2


def test_with_previous_prepends_the_end_of_the_group_before():
    x = jnp.arange(1, 25).reshape(1, 3, 4, 2)
    got = with_previous(x, 3)
    assert got.shape == (1, 3, 7, 2)
    np.testing.assert_array_equal(got[:, 0, :3], 0)
    np.testing.assert_array_equal(got[:, 1:, :3], x[:, :-1, 1:])
    np.testing.assert_array_equal(got[:, :, 3:], x)
    assert with_previous(x, 0) is x


def test_the_kernel_for_tpus_gives_the_same_values_and_gradients():
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        rng.normal(size=(2, 1, 256, heads, 64)).astype("f4") for heads in (4, 2, 2, 4)
    )
    kernel = functools.partial(module._flash, interpret=True)  # as Python, on any machine
    made, reference = (jax.vjp(f, q, k, v) for f in (kernel, attention))
    np.testing.assert_allclose(made[0], reference[0], atol=1e-5)
    for a, b in zip(made[1](weights), reference[1](weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_only_a_program_for_a_tpu_holds_the_kernel(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SCORES", 0)
    q = jax.ShapeDtypeStruct((1, 1, 128, 2, 64), jnp.float32)
    traced = jax.jit(jax.grad(lambda q: attention(q, q, q).sum())).trace(q)
    for platform, there in (("cpu", False), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == there


def test_the_kernel_for_tpus_is_split_over_a_mesh():
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        rng.normal(size=(2, 1, 256, heads, 64)).astype("f4") for heads in (4, 2, 2, 4)
    )
    kernel = functools.partial(module._flash, interpret=True)
    reference = jax.vjp(attention, q, k, v)
    sizes = {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}
    with jax.set_mesh(sharding.make_mesh(sizes, jax.devices())):
        made, grads = jax.jit(
            lambda *x: (lambda y, back: (y, back(weights)))(*jax.vjp(kernel, *x))
        )(q, k, v)
    np.testing.assert_allclose(made, reference[0], atol=1e-5)
    for a, b in zip(grads, reference[1](weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
