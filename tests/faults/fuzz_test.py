import re

import pytest

from tests.faults import fuzz, fuzz_cases

SEED = 1  # another one than that of the full lane


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_a_config_is_refused_by_name_or_can_be_trained(first, tmp_path):
    cases = [fuzz_cases.case(SEED, number) for number in range(first, first + 50)]
    outcomes = [fuzz.attempt(case, tmp_path, None, False) for case in cases]
    assert [why for kind, why in outcomes if kind == "bad"] == []
    kinds = {kind for kind, _ in outcomes}
    assert kinds == {"accepted", "refused"}


def overrides(*changes):
    names = [change.split("=")[0] for change in changes]
    return fuzz_cases.Case(
        ["--config=FILE", *(f"--config.{change}" for change in changes)],
        fuzz_cases.config_file([], "c"),
        names,
    )


def test_a_first_update_at_the_ends_of_what_is_accepted_is_finite(tmp_path):
    ends = ("learning_rate=10", "weight_decay=100", "eps=1e-16", "b1=0.99999", "b2=0.99999")
    case = overrides(*(f"optimizer.{end}" for end in ends), "optimizer.clip_norm=1e9")
    assert fuzz.attempt(case, tmp_path, set(), True) == ("updated", "")


def test_the_fuzzer_sees_an_update_that_is_not_finite(tmp_path, monkeypatch):
    from megabyte_jax import config_keys

    any_value = config_keys.KEYS["optimizer.eps"]._replace(ok=lambda x: True)
    monkeypatch.setitem(config_keys.KEYS, "optimizer.learning_rate", any_value)
    case = overrides("optimizer.learning_rate=1e30")
    kind, why = fuzz.attempt(case, tmp_path, set(), True)
    assert kind == "bad" and "not finite" in why


@pytest.mark.parametrize(
    "check, said",
    [("learning_rate", "TypeError"), ("b1", "accepted is")],
)
def test_the_fuzzer_sees_a_traceback_and_an_error_without_a_name(
    check, said, tmp_path, monkeypatch
):
    from megabyte_jax import config_keys

    key = f"optimizer.{check}"
    broken = config_keys.KEYS[key]._replace(ok=lambda x: 1 + "x" if said == "TypeError" else False)
    monkeypatch.setitem(config_keys.KEYS, key, broken)
    kind, why = fuzz.attempt(overrides("seed=3"), tmp_path, set(), False)
    assert kind == "bad" and re.search(said, why)
