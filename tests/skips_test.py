import hypothesis.strategies as st
import pytest
from hypothesis import given

from megabyte_jax import skips
from megabyte_jax.errors import UserError

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda p: (p[0], sum(p))))


@given(RANGES, st.integers(0, 45))
def test_the_batches_are_those_of_all_ranges_and_before_a_step_of_those_below_it(ranges, step):
    batches = {batch for first, stop in ranges for batch in range(first, stop)}
    union = skips.union(ranges)
    assert {batch for batch in range(50) if skips.contain(union, batch)} == batches
    assert all(stop < first for (_, stop), (first, _) in zip(union, union[1:], strict=False))
    early = skips.before(union, step)
    assert {b for b in range(50) if skips.contain(early, b)} == {b for b in batches if b < step}


def test_ranges_are_kept_in_their_order(tmp_path):
    assert skips.read(tmp_path) == []
    skips.add(tmp_path, 5, 8)
    skips.add(tmp_path, 1, 3)
    assert skips.read(tmp_path) == [(5, 8), (1, 3)]


@pytest.mark.parametrize("contents", ["", "{}x", "[1]", "[[1]]", '[["a", 2]]', "null"])
def test_what_is_damaged_is_never_taken_for_nothing(tmp_path, contents):
    (tmp_path / "skipped.json").write_text(contents)
    with pytest.raises(UserError, match="skipped.json cannot be read"):
        skips.read(tmp_path)
