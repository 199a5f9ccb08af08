import jax
import numpy as np
import pytest

from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig, TransformerConfig
from tests import runs
from tests.models import reference
from tests.models.reference import random_bytes, random_params, shapes

T, L = 13, 2
MODERN = {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "rope": True, "qk_norm": True}
SWITCHES = {
    "paper": ({}, {}),
    "modern, scaled, no positions": ({"init": "scaled", "byte_positions": False}, MODERN),
    "rope, grouped queries, head_dim": (
        {},
        {"rope": True, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    ),
    "window of 1": ({"window": 1}, {"rope": True}),
    "window of 4, grouped queries": ({"window": 4}, {"num_heads": 4, "num_kv_heads": 1}),
    "window of 5, modern, scaled": ({"window": 5, "init": "scaled"}, MODERN),
    "window of 7, no positions": ({"window": 7, "byte_positions": False}, {"activation": "gelu"}),
    "window of all but one": ({"window": T - 1}, {"rope": True}),
}

run = jax.jit(functional.logits, static_argnums=0)


def tiny(fields=None, block=None):
    stack = TransformerConfig(**{"dim": 12, "num_layers": L, "num_heads": 3, **(block or {})})
    return ByteTransformerConfig(
        **{"seq_len": T, "transformer": stack, "dtype": "float32", **(fields or {})}
    )


def expected_logits(config, params, x):
    """uint8 [T] -> float64 [T, V], one sequence at a time, under a mask over all its positions."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = np.concatenate([params["pad"][None], params["byte_embedding"][x[:-1]]])
    if config.byte_positions:
        h = h + params["position_embedding"][: len(x)]
    back = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
    sees = (back >= 0) & (back < (config.window or len(x)))
    h = reference.transformer(config.transformer, params["transformer"], h, sees)
    scale = config.transformer.dim**-0.5 / 0.3 if config.init == "scaled" else 1.0
    return h @ params["byte_embedding"].T * scale


def assert_equals_the_reference(config, x):
    params = random_params(config)
    with jax.default_matmul_precision("highest"):
        got = run(config, params, x)
    expected = np.stack([expected_logits(config, params, row) for row in x])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields, block", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_equals_the_reference(fields, block):
    assert_equals_the_reference(tiny(fields, block), random_bytes(2, T))


@pytest.mark.parametrize("length", [1, 3, 5, 10, 11])
def test_a_window_serves_shorter_sequences_of_any_length(length):
    assert_equals_the_reference(tiny({"window": 5}, MODERN), random_bytes(2, length))


def test_every_byte_value_equals_the_reference():
    every = np.random.default_rng(0).permutation(260).astype(np.uint8).reshape(20, T)
    assert_equals_the_reference(tiny({"window": 3}), every)


@pytest.mark.parametrize("window", [0, 1, 2, 4, 5, 12])
def test_a_byte_changes_the_logits_after_it_as_far_as_the_windows_of_all_layers_reach(window):
    config = tiny({"window": window})
    params, x = random_params(config), random_bytes(1, T)
    others = np.repeat(x, T, axis=0)
    others[np.arange(T), np.arange(T)] ^= 101
    before = run(config, params, np.repeat(x, T, axis=0))
    changed = np.any(np.asarray(run(config, params, others) != before), axis=-1)
    # Byte t enters at position t + 1, and every layer carries it W - 1 positions further.
    after = np.subtract.outer(np.arange(T), np.arange(T)).T
    reach = 1 + L * (window - 1) if window else T
    np.testing.assert_array_equal(changed, (after >= 1) & (after <= reach))


@pytest.mark.parametrize("fields, block", SWITCHES.values(), ids=SWITCHES)
def test_the_parameter_count_is_the_closed_formula(fields, block):
    config = tiny(fields, block)
    rows = 256 + 1 + T * config.byte_positions
    expected = reference.stack_parameter_count(config.transformer) + rows * 12
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(config))) == expected


@pytest.mark.parametrize("window", [0, 5])
def test_training_starts_at_guessing_moves_every_parameter_and_learns_every_byte_value(window):
    config = tiny({"window": window}, {"dim": 24, "rope": True, "qk_norm": True})
    every = np.random.default_rng(0).permutation(260).astype(np.uint8).reshape(20, T)
    x = np.concatenate([every, every[:, ::-1]])  # so that each follows another one once
    before = functional.init_params(config, jax.random.key(0))
    params, losses = runs.fit(config, before, np.tile(x, (100, 1, 1)))
    assert abs(losses[0] - 8) < 0.01 and losses[5] < losses[0]
    probabilities = jax.nn.softmax(run(config, params, x))
    likely = np.take_along_axis(probabilities, x[..., None].astype(int), -1)[..., 0] > 0.5
    assert likely[:, 1:].all()
    leaves = jax.tree_util.tree_leaves_with_path(before)
    for (path, old), new in zip(leaves, jax.tree.leaves(params), strict=True):
        assert np.any(old != new), jax.tree_util.keystr(path)
