import functools

import jax
import numpy as np
import pytest

from megabyte_jax import evaluation
from megabyte_jax.optimizer import make_optimizer
from megabyte_jax.training import init_state, judged, make_pass_over, make_train_step
from tests import runs

BATCH = np.random.default_rng(0).integers(0, 256, (4, runs.T), np.uint8)


def rate(step):
    return 0.01


@functools.cache
def step_of(model, parts, seed):
    """The state before the first update, and the update."""
    optimizer = make_optimizer(runs.tiny_config("stdlib").optimizer, rate)
    return init_state(model, optimizer, 0), make_train_step(model, optimizer, rate, seed, parts)


def one_update(dropout=0.0, parts=1, seed=0, step=0):
    """The state and the metrics after one update on BATCH."""
    start, update = step_of(runs.tiny_model(dropout, "scaled"), parts, seed)
    start = jax.tree.map(jax.numpy.array, start)  # the update takes over its memory
    return update(start._replace(step=jax.numpy.int32(step)), BATCH)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts):
    (whole, metrics), (state, other) = one_update(), one_update(parts=parts)
    for name, value in metrics.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)
    # The first update of Adam divides by the gradient, whose rounding counts where it is near 0.
    first, second = (s.opt_state[1][0].mu for s in (whole, state))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    moved = zip(jax.tree.leaves(whole.params), jax.tree.leaves(state.params), strict=True)
    assert np.quantile(np.concatenate([np.ravel(np.abs(a - b)) for a, b in moved]), 0.99) < 1e-6


def test_the_loss_of_a_batch_is_that_of_evaluating_its_bytes():
    model = runs.tiny_model(init="scaled")
    params = step_of(model, 1, 0)[0].params
    result = evaluation.evaluate(model, params, runs.corpus_of(BATCH.tobytes()), batch_size=3)
    loss = one_update()[1]["loss"]
    np.testing.assert_allclose(result.bits_per_byte * np.log(2), loss, rtol=1e-6)


def test_the_gradient_norm_is_that_before_the_clip():
    assert one_update()[1]["grad_norm"] > 1.0


def test_dropout_is_drawn_anew_for_every_step_and_seed():
    draws = [dict(step=0), dict(step=1), dict(seed=1), dict(step=0)]
    losses = [float(one_update(dropout=0.3, **draw)[1]["loss"]) for draw in draws]
    assert len(set(losses[:3])) == 3 and losses[0] == losses[3]


def test_an_update_counts_itself_and_reports_the_rate_it_used():
    state, metrics = one_update(step=7)
    assert state.step == 8 and state.step.dtype == np.int32
    np.testing.assert_allclose(metrics["learning_rate"], 0.01)


def poisoned(state, name):
    """The state with one value of the leaf of this name replaced."""

    def one(path, x):
        here = jax.tree_util.keystr(path, simple=True, separator=".") == name
        return x.reshape(-1).at[-1].set(np.nan).reshape(x.shape) if here else x

    tree = {"params": state.params, "opt_state": state.opt_state}
    return state._replace(**jax.tree.map_with_path(one, tree))


def same(one, two):
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def test_what_is_not_finite_is_named_and_nothing_is_applied():
    start, update = step_of(runs.tiny_model(init="scaled"), 1, 0)
    names = judged(start)
    for name in [name for name in names if name.startswith(("params", "opt_state"))]:
        state = poisoned(jax.tree.map(jax.numpy.array, start), name)
        expected = make_pass_over()(jax.tree.map(jax.numpy.array, state))
        after, metrics = update(state, BATCH)
        bad = [n for n, ok in zip(names, metrics["finite"], strict=True) if not ok]
        assert name in bad and not metrics["applied"]
        assert not any(n.startswith(("params", "opt_state")) and n != name for n in bad)
        assert same(after, expected)


@pytest.mark.parametrize("key, below", [("max_loss", 7.9), ("max_grad_norm", 1.0)])
def test_a_spike_is_not_applied_and_what_is_below_it_is(key, below):
    model, config = runs.tiny_model(init="scaled"), runs.tiny_config("stdlib")
    optimizer = make_optimizer(config.optimizer, rate)
    for limit, applied in ((below, False), (100.0, True)):
        config.guard[key] = limit
        update = make_train_step(model, optimizer, rate, 0, 1, None, config.guard)
        start = init_state(model, optimizer, 0)
        expected = one_update()[0] if applied else make_pass_over()(init_state(model, optimizer, 0))
        after, metrics = update(start, BATCH)
        assert bool(metrics["applied"]) == applied and bool(metrics["finite"].all())
        assert same(after, expected)


def test_a_batch_that_is_left_out_leaves_the_schedule_where_it_would_be():
    start, _ = step_of(runs.tiny_model(init="scaled"), 1, 0)
    after = make_pass_over()(jax.tree.map(jax.numpy.array, start))
    made = one_update()[0]
    counts = lambda state: [int(x) for x in jax.tree.leaves(state) if x.dtype == np.int32]  # noqa: E731
    assert counts(after) == counts(made) and same(after.params, start.params)
