import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.errors import UserError
from megabyte_jax.generation import filter_logits, stream
from megabyte_jax.models import megabyte
from megabyte_jax.trained import TrainedModel
from tests import runs

P, T = runs.P, runs.T
PROMPT = bytes(np.random.default_rng(0).integers(0, 256, 3 * T, np.uint8))


@pytest.fixture(scope="module")
def model():
    config = runs.tiny_model(init="scaled")
    return TrainedModel(config, megabyte.init_params(config, jax.random.key(3)), 0)


def greedy(model, prompt, num_bytes):
    """The likeliest bytes, from all the logits of as much as the model is said to see."""
    context = list(prompt)
    for _ in range(num_bytes):
        if len(context) >= T:
            context = context[-T // 2 :]
        padded = np.array([context + [0] * (T - len(context))], np.uint8)
        context.append(int(model.logits(padded)[0, len(context)].argmax()))
        yield context[-1]


@pytest.mark.parametrize("length", [*range(P + 2), T - 1, T, T + 1, 3 * T])
def test_greedy_generation_takes_the_likeliest_byte_each_time(model, length):
    expected = bytes(greedy(model, PROMPT[:length], 9))
    assert model.generate(PROMPT[:length], 9, temperature=0.0) == expected


def test_generation_steps_past_the_context(model):
    expected = bytes(greedy(model, b"a", 3 * T))
    assert model.generate(b"a", 3 * T, temperature=0.0) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("length", [0, 1, T, 3 * T])
def test_no_bytes_are_made_when_none_are_asked_for(model, length):
    assert model.generate(PROMPT[:length], 0) == b""


def test_the_seed_decides_the_bytes(model):
    one, again, other = (model.generate(b"ab", 20, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_a_prefix_does_not_depend_on_how_many_bytes_follow(model):
    assert model.generate(b"ab", 30, seed=1)[:11] == model.generate(b"ab", 11, seed=1)


def test_the_stream_gives_the_bytes_of_generate_one_by_one(model):
    settings = 20, 0.7, 9, 0.8, 5
    parts = list(model.stream(b"ab", *settings))
    assert all(len(part) == 1 for part in parts)
    assert b"".join(parts) == model.generate(b"ab", *settings)


@pytest.mark.parametrize(
    "limits",
    [{"temperature": t} for t in (1e-3, 1e-37, 1e-40, 1e-45, 1e-60)]
    + [{"top_k": 1}, {"top_p": 1e-9}],
    ids=str,
)
def test_the_limits_of_the_settings_are_greedy(model, limits):
    expected = model.generate(b"ab", 12, temperature=0.0)
    assert model.generate(b"ab", 12, **limits) == expected


def test_the_bytes_come_in_the_proportions_of_the_model(model):
    probability = np.exp(model.logits(np.zeros((1, 1), np.uint8))[0, 0])
    probability /= probability.sum()
    first = [model.generate(b"", 1, seed=seed)[0] for seed in range(400)]
    likely = np.argsort(-probability)[:40]
    expected, got = probability[likely].sum(), np.isin(first, likely).mean()
    assert abs(got - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)


def filtered(logits, temperature, top_k, top_p):
    """The bytes that may come, by adding them up from the likeliest on."""
    logits = (logits - logits.max()) / temperature
    p = np.exp(logits) / np.exp(logits).sum()
    kept, total = np.full(256, -np.inf), 0.0
    for rank, byte in enumerate(np.argsort(-p, kind="stable")):
        if rank < top_k and (rank == 0 or total < top_p):
            kept[byte] = np.log(p[byte])
        total += p[byte]
    return kept


@functools.cache
def compiled_filter():
    return jax.jit(lambda *args: jax.nn.log_softmax(filter_logits(*args)))


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    top_k=st.integers(1, 256),
    top_p=st.floats(0.001, 0.999),
)
def test_the_filter_keeps_the_likeliest_and_their_proportions(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, 256).astype(np.float32)
    expected = filtered(logits.astype(np.float64), temperature, top_k, top_p)
    expected -= np.log(np.exp(expected).sum())
    arguments = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    made = np.asarray(compiled_filter()(logits, *arguments))
    # A sum within rounding of top_p may fall on either side of it, by one byte.
    assert abs(np.isfinite(made).sum() - np.isfinite(expected).sum()) <= 1
    if (np.isfinite(made) == np.isfinite(expected)).all():
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("num_bytes", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", 257),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**70),
    ],
)
def test_a_setting_out_of_range_is_named(model, setting, value):
    arguments = {"num_bytes": 1, setting: value}
    with pytest.raises(UserError, match=f"--{setting}={value}: accepted is"):
        next(stream(model.config, model.params, b"", arguments.pop("num_bytes"), **arguments))
