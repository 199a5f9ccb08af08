import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megabyte_jax.errors import UserError
from megabyte_jax.sampling import Sampling, filter_logits


def filtered(logits, temperature, top_k, top_p, min_p):
    """The bytes that may come, by adding them up from the likeliest on."""
    logits = (logits - logits.max()) / temperature
    p = np.exp(logits) / np.exp(logits).sum()
    kept, total = np.full(256, -np.inf), 0.0
    for rank, byte in enumerate(np.argsort(-p, kind="stable")):
        if rank < top_k and (rank == 0 or total < top_p) and p[byte] >= min_p * p.max():
            kept[byte] = np.log(p[byte])
        total += p[byte]
    return kept


@functools.cache
def compiled_filter():
    return jax.jit(lambda *args: jax.nn.log_softmax(filter_logits(*args)))


@settings(deadline=None, max_examples=100)
@example(0, 0.1, 5, 1.0, 0.0)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    top_k=st.integers(1, 256),
    top_p=st.floats(0.001, 1),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9]),
)
def test_the_filter_keeps_the_likeliest_and_their_proportions(
    seed, temperature, top_k, top_p, min_p
):
    logits = np.random.default_rng(seed).normal(0, 2, (3, 256)).astype(np.float32)
    limits = temperature, top_k, top_p, min_p
    arguments = *map(jnp.float32, limits[:1]), jnp.int32(top_k), *map(jnp.float32, limits[2:])
    rows = np.asarray(compiled_filter()(logits, *arguments))
    for made, row in zip(rows, logits, strict=True):
        expected = filtered(row.astype(np.float64), *limits)
        expected -= np.log(np.exp(expected).sum())
        # A sum within rounding of top_p may fall on either side of it, by one byte.
        assert abs(np.isfinite(made).sum() - np.isfinite(expected).sum()) <= 1
        if (np.isfinite(made) == np.isfinite(expected)).all():
            np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", 257),
        ("top_k", 2.5),
        ("seed", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("seed", -1),
        ("seed", 2**70),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(UserError, match=f"--{setting}={value}: accepted is"):
        Sampling(**{setting: value})
