import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megabyte_jax.models import functional
from megabyte_jax.models.config import MegabyteConfig, TransformerConfig
from tests import runs
from tests.models import reference
from tests.models.reference import random_bytes, random_params, shapes, tiny

run = jax.jit(functional.logits, static_argnums=0)

MODERN = {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "rope": True, "qk_norm": True}
SWITCHES = {
    "paper": {},
    "modern": {"both": MODERN},
    "rmsnorm, relu2": {"both": {"norm": "rmsnorm", "activation": "relu2"}},
    "gelu, no bias": {"both": {"activation": "gelu", "bias": False}},
    "swiglu with bias, mlp_dim": {"both": {"activation": "swiglu", "mlp_dim": 14}},
    "qk_norm, one kv head": {"both": {"qk_norm": True, "num_heads": 4, "num_kv_heads": 1}},
    "grouped queries, head_dim": {"both": {"head_dim": 10, "num_heads": 6, "num_kv_heads": 2}},
    "rope, cross-patch of 1": {"cross_patch": 1, "both": {"rope": True}},
    "rope, no cross-patch": {"cross_patch": 0, "both": {"rope": True}},
    "cross-patch of 3, no positions": {
        "cross_patch": 3,
        "byte_positions": False,
        "local_positions": False,
    },
    "convolutions, scaled": {"conv_kernels": (3, 5, 7), "init": "scaled"},
    "remat, unrolled": {
        "global_model": {"remat": "full", "scan_unroll": 2},
        "local_model": {"remat": "dots", "scan_unroll": 2},
    },
}


def random_switches(seed):
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    both = {name: one_of(True, False) for name in ("bias", "qk_norm", "rope")}
    both |= {"norm": one_of("layernorm", "rmsnorm"), "scan_unroll": one_of(1, 3)}
    both |= {"activation": one_of("relu", "relu2", "gelu", "swiglu"), "mlp_dim": one_of(0, 14)}
    both |= {"num_heads": 6, "num_kv_heads": one_of(0, 1, 2, 3), "head_dim": one_of(6, 10)}
    fields = {name: one_of(True, False) for name in ("byte_positions", "local_positions")}
    fields |= {"cross_patch": one_of(-1, 0, 2), "conv_kernels": one_of((), (2,), (7, 3))}
    return {"both": both, "init": one_of("paper", "scaled"), **fields}


def assert_equals_the_reference(config, x, seed=0):
    params = random_params(config, seed)
    with jax.default_matmul_precision("highest"):
        got = run(config, params, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference.logits(config, params, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_equals_the_equations(switches):
    assert_equals_the_reference(tiny(**switches), random_bytes(2, 12))


@pytest.mark.parametrize("seed", range(4))
def test_random_switches_equal_the_equations(seed):
    config = tiny(**random_switches(seed))
    assert_equals_the_reference(config, random_bytes(2, 12, seed=seed), seed)


def test_every_byte_value_at_full_length_equals_the_equations():
    every = np.random.default_rng(0).permutation(260).astype(np.uint8).reshape(13, 20)
    assert_equals_the_reference(tiny(both=MODERN, cross_patch=2), every)


@pytest.mark.parametrize("P, K", [(1, 6), (6, 1)])
def test_patches_of_one_byte_and_a_single_patch_equal_the_equations(P, K):
    config = tiny(both={"rope": True}, seq_len=P * K, patch_size=P, conv_kernels=(3,))
    assert_equals_the_reference(config, random_bytes(2, P * K))


def what_changes(config, params):
    """bool [T, T], whether another byte at t changes, in any bit, the logits at s."""
    x = random_bytes(1, config.seq_len)
    before = run(config, params, x)
    rows = []
    for t in range(config.seq_len):
        other = x.copy()
        other[0, t] ^= 101
        rows.append(np.any(np.asarray(run(config, params, other) != before), axis=(0, 2)))
    return np.stack(rows)


REACH = {
    "cross-patch": {},
    "no cross-patch": {"cross_patch": 0},
    "convolutions": {"conv_kernels": (3, 5, 7), "cross_patch": 2},
    "modern": {"both": MODERN},
}


@pytest.mark.parametrize("switches", REACH.values(), ids=REACH)
def test_a_byte_changes_every_later_logit_and_no_other(switches):
    config = tiny(**switches)
    changed = what_changes(config, random_params(config))
    np.testing.assert_array_equal(changed, np.triu(np.ones_like(changed), k=1))


@pytest.mark.parametrize("r", [0, 2, 4])
def test_without_the_global_model_bytes_reach_as_far_as_cross_patch_attention(r):
    config = tiny(cross_patch=r, local_model={"num_layers": 2})
    params = random_params(config)
    params["global_to_local"]["kernel"][:] = 0
    T, P = config.seq_len, config.patch_size
    hops = np.linalg.matrix_power(reference.local_mask(T, P, r).astype(int), 2) > 0
    expected = np.zeros((T, T), bool)
    for t in range(T - 1):
        if (t + 1) % P:  # the last byte of a patch enters no local input
            expected[t] = hops[:, t + 1]
    np.testing.assert_array_equal(what_changes(config, params), expected)


def test_the_first_byte_of_a_patch_is_predicted_from_the_patches_before_it():
    config = tiny(cross_patch=0)
    params, P = random_params(config), config.patch_size
    changed = what_changes(config, params)
    for k in range(1, config.seq_len // P):
        assert changed[(k - 1) * P : k * P, k * P].all()
        assert not changed[k * P :, k * P].any()


def parameter_count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


def test_the_parameter_count_is_the_closed_formula():
    cases = [*SWITCHES.values(), *map(random_switches, range(8))]
    for config in (tiny(**case) for case in cases):
        assert parameter_count(config) == reference.parameter_count(config), config


def test_the_largest_text_model_of_the_paper_has_its_parameters():
    config = MegabyteConfig(
        seq_len=8192,
        patch_size=8,
        global_model=TransformerConfig(dim=2048, num_layers=14, num_heads=32, scan_unroll=14),
        local_model=TransformerConfig(dim=1024, num_layers=18, num_heads=16),
    )
    assert parameter_count(config) == reference.parameter_count(config)
    blocks = {name: shapes(config)[name]["blocks"] for name in ("global_model", "local_model")}
    millions = {k: sum(leaf.size for leaf in jax.tree.leaves(v)) / 1e6 for k, v in blocks.items()}
    assert {k: round(v) for k, v in millions.items()} == {"global_model": 705, "local_model": 227}


@pytest.fixture(scope="module")
def fresh():
    config = tiny(both={"rope": True, "qk_norm": True}, conv_kernels=(3,))
    return config, functional.init_params(config, jax.random.key(0))


def test_random_bytes_cannot_be_learned_by_copying_them(fresh):
    _, losses = runs.fit(*fresh, random_bytes(300, 2, 20))
    assert np.mean(losses[-100:]) > 7.99


def test_one_batch_is_learned_by_heart_and_trains_every_parameter(fresh):
    params, losses = runs.fit(*fresh, np.tile(random_bytes(1, 2, 20), (300, 1, 1)))
    assert losses[-1] < 0.1
    before = jax.tree_util.tree_leaves_with_path(fresh[1])
    for (path, old), new in zip(before, jax.tree.leaves(params), strict=True):
        assert np.any(old != new), jax.tree_util.keystr(path)


def first_bits(config, params):
    x = random_bytes(8, 20)
    predicted = run(config, params, x)
    nll = optax.softmax_cross_entropy_with_integer_labels(predicted, x.astype(int))
    return nll.mean() / np.log(2)


def test_the_first_loss_of_the_paper_is_that_of_guessing(fresh):
    assert abs(first_bits(*fresh) - 8) < 0.01


def test_the_first_loss_of_scaled_weights_is_not_far_from_guessing():
    config = tiny(init="scaled")
    params = functional.init_params(config, jax.random.key(0))
    assert 7.99 < first_bits(config, params) < 11


def test_nll_is_the_probability_of_the_byte_itself():
    config = tiny()
    params, x = random_params(config), random_bytes(2, 12)
    logits = reference.logits(config, params, x)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probability, x[..., None].astype(int), -1)[..., 0])
    got = jax.jit(functional.nll, static_argnums=0)(config, params, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_the_paper_initialisation_is_cut_at_two_deviations_and_smaller_on_residual_outputs(fresh):
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh[1]):
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if "bias" in name or "scale" in name:
            assert (leaf == ("scale" in name)).all(), name
            continue
        layers = {"global_model": 2, "local_model": 3}.get(path[0].key)
        residual = "['out']" in name or "['down']" in name
        sigma = 0.006 / np.sqrt(2 * layers) if residual else 0.006
        assert np.abs(leaf).max() <= 2 * sigma, name
        # The cut leaves 0.8796 of the deviation; a sample's own is off by 1 / sqrt(2 n).
        assert abs(leaf.std() / (0.8796 * sigma) - 1) < 4 / np.sqrt(2 * leaf.size), name


def test_every_layer_starts_with_weights_of_its_own(fresh):
    kernel = fresh[1]["local_model"]["blocks"]["attention"]["query"]["kernel"]
    assert len({float(layer[0, 0]) for layer in kernel}) == 3


def test_bfloat16_gives_float32_logits_near_those_of_float32():
    params, x = random_params(tiny()), random_bytes(2, 12)
    logits = run(tiny(dtype="bfloat16"), params, x)
    exact = run(tiny(), params, x)
    assert logits.dtype == jnp.float32
    assert 0 < np.std(logits - exact) < 0.03 * np.std(exact)


def test_dropout_follows_its_key_and_needs_one():
    config = tiny(both={"dropout": 0.3})
    params, x = random_params(config), random_bytes(2, 12)
    without = run(tiny(), params, x)
    np.testing.assert_array_equal(run(config, params, x), without)
    first, again, other = (run(config, params, x, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.any(first != other, axis=-1))
    assert np.all(np.any(first != without, axis=-1))


def test_dropout_leaves_predictions_blind_to_later_bytes():
    config = tiny(both={"dropout": 0.3})
    params, x, key = random_params(config), random_bytes(2, 12), jax.random.key(0)
    other = x.copy()
    other[:, 5] ^= 101
    changed = np.any(run(config, params, x, key) != run(config, params, other, key), axis=(0, 2))
    assert not changed[:6].any() and changed[6:].any()


@pytest.mark.parametrize("r, P, G", [(-1, 4, 2), (2, 4, 3), (0, 4, 1), (3, 3, 4), (-1, 2, 1)])
def test_groups_of_patches_give_the_loss_and_gradient_of_all_at_once(r, P, G):
    block = {"rope": r != 0, "num_layers": 3}
    whole = tiny(patch_size=P, seq_len=12 * P, cross_patch=r, both=block)
    groups = dataclasses.replace(whole, group_size=G)
    params = random_params(whole)
    x = random_bytes(2, whole.seq_len)
    assert_same_gradients(whole, groups, params, x)
    # A sequence that is no whole number of groups is taken at once.
    short = [nll(config, params, x[:, : 7 * P]) for config in (whole, groups)]
    np.testing.assert_allclose(*short, atol=1e-5)


nll = jax.jit(functional.nll, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, params, x):
    # Weights that differ, so that no two bytes can be confused.
    weights = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) / x.size
    losses, back = jax.vjp(lambda params: functional.nll(config, params, x), params)
    return losses, back(weights)


def assert_same_gradients(one, other, params, x):
    first, second = (loss_and_gradient(config, params, x) for config in (one, other))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(a).max(), 1))


def test_parameters_are_kept_in_the_type_that_is_asked_for():
    config = tiny(dtype="float32", param_dtype="bfloat16", init="scaled")
    params = functional.init_params(config, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    x = random_bytes(1, config.seq_len)
    np.testing.assert_allclose(run(config, params, x), run(config, exact, x), atol=1e-5)
