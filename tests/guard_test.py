import math

import numpy as np
import pytest

from megabyte_jax.data.windows import TrainWindows
from megabyte_jax.errors import NonFiniteError
from megabyte_jax.guard import Guard, RollBack
from tests import runs

NAMES = ["params.a", "opt_state.m", "loss", "grads.a"]
SAMPLER = TrainWindows(runs.corpus_of(bytes(range(64))), seq_len=4, batch_size=2, seed=0)


def guard(rollbacks=0, **changes):
    config = runs.tiny_config("x", **{f"guard.{key}": value for key, value in changes.items()})
    return Guard(config.guard, NAMES, SAMPLER, rollbacks)


def metrics(*bad, applied=False, **changes):
    finite = np.array([name not in bad for name in NAMES])
    given = {"loss": 2.0, "grad_norm": 3.0, "param_norm": 4.0, "learning_rate": 0.5, **changes}
    return {"finite": finite, "applied": np.bool_(applied), **given}


def test_an_update_that_was_made_is_let_through():
    assert guard().judge(1, metrics(applied=True)) is None


@pytest.mark.parametrize("policy", ["abort", "skip_update", "rollback_skip"])
@pytest.mark.parametrize("bad", ["params.a", "opt_state.m"])
def test_a_state_that_is_not_finite_ends_the_run_whatever_the_policy(policy, bad):
    with pytest.raises(NonFiniteError, match=rf"update 3: {bad} is not finite.*learning_rate"):
        guard(policy=policy).judge(3, metrics(bad))


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_parameters_that_an_update_spoils_end_the_run(norm):
    with pytest.raises(NonFiniteError, match="update 3: params, as the update made them"):
        guard(policy="skip_update").judge(3, metrics(applied=True, param_norm=norm))


def test_what_is_refused_is_named_with_its_batch_and_the_places_of_its_bytes():
    with pytest.raises(NonFiniteError) as error:
        guard().judge(6, metrics("loss", "grads.a", loss=math.nan))
    windows = [bytes(row) for row in SAMPLER.rows(5, 0, 2)]
    stream = bytes(range(64)) * 2
    places = ", ".join(str(stream.index(window)) for window in windows)
    assert "update 6: loss, grads.a are not finite, with a loss of nan" in str(error.value)
    assert f"its batch 5 has the windows at bytes {places} of c" in str(error.value)
    assert error.value.exit_status == 6


def test_updates_are_skipped_up_to_so_many_in_a_row():
    judge = guard(policy="skip_update", max_skips=2).judge
    for _ in range(2):
        for step in (1, 2):
            assert "is a spike" in judge(step, metrics())
        assert judge(3, metrics(applied=True)) is None
    assert judge(4, metrics()) and judge(5, metrics())
    with pytest.raises(NonFiniteError, match="the last 2 were skipped, guard.max_skips"):
        judge(6, metrics())


@pytest.mark.parametrize("step, first, stop", [(10, 6, 13), (2, 0, 5)])
def test_a_run_goes_back_to_before_the_window_of_a_bad_batch(step, first, stop):
    with pytest.raises(RollBack, match="is a spike") as back:
        guard(policy="rollback_skip", rollback_window=3).judge(step, metrics())
    assert (back.value.first, back.value.stop) == (first, stop)
    with pytest.raises(NonFiniteError, match="gone back 10 times"):
        guard(policy="rollback_skip", rollbacks=10).judge(step, metrics())
