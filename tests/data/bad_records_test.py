import pytest

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import DataError


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_one_record_beyond_the_limit_is_an_error_that_names_it(limit):
    bad = BadRecords(limit)
    for i in range(limit):
        bad.add(f"file {i}: broken")
    with pytest.raises(DataError) as raised:
        bad.add(f"file {limit}: broken")
    expected = f"file {limit}: broken; a larger data.max_bad_records={limit} would leave it out"
    assert str(raised.value) == expected and raised.value.exit_status == 3


def test_several_may_be_noted_at_once_and_names_are_escaped():
    bad = BadRecords(3)
    bad.add("a\nb\x1b[0m été: empty", 3)
    assert (bad.count, bad.first) == (3, r"a\nb\x1b[0m été: empty")
    with pytest.raises(DataError, match="^c: cut"):
        bad.add("c: cut")


def test_the_report_counts_them_and_shows_the_first(capsys):
    bad = BadRecords(2)
    bad.report()
    bad.add(DataError("a: empty"))
    bad.add("b: cut short")
    bad.report()
    assert capsys.readouterr() == ("", "left out 2 bad records, the first: a: empty\n")
