import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax import generation
from megabyte_jax.errors import NonFiniteError, UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig, MegabyteConfig, TransformerConfig
from megabyte_jax.sampling import Sampling
from megabyte_jax.trained import TrainedModel
from tests import runs

P, T = runs.P, runs.T
PROMPT = bytes(np.random.default_rng(0).integers(0, 256, 3 * T, np.uint8))
STACK = TransformerConfig(dim=16, num_layers=2, num_heads=2)
BASELINE = {"transformer": STACK, "init": "scaled", "dtype": "float32"}
CONFIGS = {
    "megabyte": runs.tiny_model(init="scaled"),
    "one patch": MegabyteConfig(
        seq_len=4, patch_size=4, global_model=STACK, local_model=STACK, dtype="float32"
    ),
    "baseline": ByteTransformerConfig(seq_len=T, **BASELINE),
    "window": ByteTransformerConfig(seq_len=T, window=5, **BASELINE),
}


@functools.cache
def make(name):
    config = CONFIGS[name]
    return TrainedModel(config, functional.init_params(config, jax.random.key(3)), 0)


@pytest.fixture
def model(request):
    return make(getattr(request, "param", "megabyte"))


each_model = pytest.mark.parametrize("model", list(CONFIGS), indirect=True)


def contexts(model, prompt, made):
    """What the model is said to see before each byte made."""
    context, T = list(prompt), model.config.seq_len
    for byte in made:
        if len(context) >= T:
            context = context[len(context) - T // 2 :]
        yield bytes(context)
        context.append(byte)


def logits_after(model, context):
    """All the logits computed anew for one byte."""
    padded = np.zeros((1, model.config.seq_len), np.uint8)
    padded[0, : len(context)] = np.frombuffer(context, np.uint8)
    return model.logits(padded)[0, len(context)].astype(np.float64)


def check_greedy(model, prompt, made):
    likeliest = [logits_after(model, c).argmax() for c in contexts(model, prompt, made)]
    assert list(made) == likeliest


@each_model
@pytest.mark.parametrize("length", [*range(P + 2), T - 1, T, T + 1, 3 * T])
def test_greedy_generation_takes_the_likeliest_byte_each_time(model, length):
    made = model.generate(PROMPT[:length], 9, temperature=0.0)
    assert len(made) == 9
    check_greedy(model, PROMPT[:length], made)


@each_model
def test_generation_slides_past_the_context(model):
    made = model.generate(b"a", 3 * T, temperature=0.0)
    assert len(made) == 3 * T
    check_greedy(model, b"a", made)


def test_what_is_made_past_the_context_is_not_always_the_same(model):
    assert len(set(model.generate(b"a", 3 * T, temperature=0.0))) > 3


@each_model
def test_the_log_likelihoods_are_those_of_the_model_whatever_the_settings(model):
    (made,) = model.decoder.generate([b"ab"], 2 * T, Sampling(temperature=0.7, top_k=30))
    expected = []
    for byte, context in zip(made.data, contexts(model, b"ab", made.data), strict=True):
        logits = logits_after(model, context)
        expected.append(logits[byte] - np.log(np.exp(logits).sum()))
    assert made.log_probs.dtype == np.float32
    np.testing.assert_allclose(made.log_probs, expected, rtol=0, atol=1e-5)


@each_model
def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    prompts = [PROMPT[:n] for n in (0, 1, P, T - 2, T, 2 * T, 3)]
    together = model.decoder.generate(prompts, 2 * T, Sampling(seed=7))
    for i, (prompt, made) in enumerate(zip(prompts, together, strict=True)):
        assert made.data == model.generate(prompt, 2 * T, seed=7 + i)


def test_no_prompts_give_nothing(model):
    assert model.decoder.generate([], 5) == []


@pytest.mark.parametrize("length", [0, 1, T, 3 * T])
def test_no_bytes_are_made_when_none_are_asked_for(model, length):
    (made,) = model.decoder.generate([PROMPT[:length]], 0)
    assert made.data == b"" and made.log_probs.shape == (0,)


def test_the_seed_decides_the_bytes(model):
    one, again, other = (model.generate(b"ab", 20, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_a_prefix_does_not_depend_on_how_many_bytes_follow(model):
    assert model.generate(b"ab", 30, seed=1)[:11] == model.generate(b"ab", 11, seed=1)


def test_the_stream_gives_the_bytes_of_generate_one_by_one(model):
    settings = 60, 0.7, 9, 0.8, 5
    parts = list(model.stream(b"ab", *settings))
    assert all(len(part) == 1 for part in parts)
    assert b"".join(parts) == model.generate(b"ab", *settings)


@settings(deadline=None, max_examples=60)
@given(start=st.integers(0, 140), size=st.integers(1, 9), prompt=st.binary(max_size=2 * T))
def test_an_output_ends_with_the_first_stop_string_in_it(start, size, prompt):
    model = make("megabyte")
    whole = model.generate(prompt, 150, 0.5)
    stop = whole[start : start + size]
    end = whole.find(stop) + len(stop)
    assert model.generate(prompt, 150, 0.5, stop=stop) == whole[:end]
    assert b"".join(model.stream(prompt, 150, 0.5, stop=stop)) == whole[:end]


def test_each_output_of_a_batch_stops_by_itself(model):
    prompts = [b"", b"abc", PROMPT[:T]]
    whole = model.decoder.generate(prompts, 150)
    stop = whole[1].data[4:6]
    for all_of_it, made in zip(whole, model.decoder.generate(prompts, 150, stop=stop), strict=True):
        found = all_of_it.data.find(stop)
        end = found + 2 if found >= 0 else 150
        assert made.data == all_of_it.data[:end]
        np.testing.assert_array_equal(made.log_probs, all_of_it.log_probs[:end])


def test_a_stop_string_in_the_prompt_alone_stops_nothing(model):
    whole = model.generate(b"abc", 40, seed=2)
    assert b"bc" not in whole and model.generate(b"abc", 40, seed=2, stop=b"bc") == whole


def test_neither_lengths_nor_settings_nor_sliding_compile_again(model):
    model.generate(PROMPT[:T], 1)
    decoders = generation._decode._cache_size()
    prefills = generation._prefill._cache_size()
    for length in (0, 1, 5, T, 3 * T):
        model.generate(PROMPT[:length], length + 2 * T, 0.5, 7, 0.9, seed=length, min_p=0.01)
        list(model.stream(PROMPT[:length], T, stop=b"no such"))
    assert generation._decode._cache_size() == decoders
    # Prompts of up to 1, 2, 4 and 6 patches.
    assert generation._prefill._cache_size() <= prefills + 4


def test_the_cache_is_taken_over_and_not_copied(model):
    decoder = model.decoder
    window, cache = decoder._first_window([b"a"])
    keys = jax.vmap(jax.random.key)(np.zeros(1, np.uint32))
    unstacked = decoder._unstacked
    generation._decode(
        model.config, unstacked, cache, window, keys, Sampling().settings, jnp.int32(1)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    "limits",
    [{"temperature": t} for t in (1e-3, 1e-37, 1e-40, 1e-45, 1e-60)]
    + [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}],
    ids=str,
)
def test_the_limits_of_the_settings_are_greedy(model, limits):
    expected = model.generate(b"ab", 12, temperature=0.0)
    assert model.generate(b"ab", 12, **limits) == expected


def test_the_bytes_come_in_the_proportions_of_the_model(model):
    probability = np.exp(model.logits(np.zeros((1, 1), np.uint8))[0, 0])
    probability /= probability.sum()
    first = [made.data[0] for made in model.decoder.generate([b""] * 400, 1)]
    likely = np.argsort(-probability)[:40]
    expected, got = probability[likely].sum(), np.isin(first, likely).mean()
    assert abs(got - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"num_bytes": -1}, "--num_bytes=-1: accepted is"),
        (
            {"num_bytes": 3, "stop": b"four"},
            "--stop=b'four': accepted is .* 1 to num_bytes=3 bytes",
        ),
        ({"num_bytes": 3, "stop": b""}, "--stop=b'': accepted is"),
    ],
)
def test_a_length_that_does_not_fit_is_told_before_anything_is_made(model, arguments, named):
    for make_bytes in (model.generate, model.stream):
        with pytest.raises(UserError, match=named):
            make_bytes(b"", **arguments)


@pytest.mark.parametrize("prompts", [["abc"], [b"a", None], b"abc"])
def test_what_is_no_bytes_is_told(model, prompts):
    with pytest.raises(UserError, match="prompt: accepted is bytes"):
        model.decoder.generate(prompts, 5)


@pytest.mark.parametrize("arguments", [{"num_bytes": 5.5}, {"num_bytes": 5, "stop": "a"}])
def test_lengths_and_stops_of_other_types_are_told(model, arguments):
    with pytest.raises(UserError, match="accepted is a (whole number|string)"):
        model.generate(b"", **arguments)


def test_a_model_that_is_no_longer_finite_generates_nothing(model):
    params = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    with pytest.raises(NonFiniteError, match="predictions are not finite"):
        generation.generate(model.config, params, [b"abc"], 5)


def test_the_optimised_program_gives_the_same_bytes():
    """The other tests turn the compiler's optimisation off, which fuses and so rounds otherwise."""
    code = """if True:
        from tests.generation_test import check_greedy, make

        for name in ("megabyte", "window"):
            model = make(name)
            greedy = model.generate(b"ab", 40, temperature=0.0)
            check_greedy(model, b"ab", greedy)
            limits = {"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-9}
            limits += ({"temperature": 1e-30, "top_p": 0.5, "min_p": 0.5},)
            for limit in limits:
                assert model.generate(b"ab", 40, **limit) == greedy, limit
    """
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
