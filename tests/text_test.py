import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megabyte_jax import text
from megabyte_jax.text import printable, printable_stream
from tests import runs

VISIBLE = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]))


@given(st.lists(st.binary(max_size=5)))
@example([b"\xc3", b"", b"\xa9", b"\xe2\x88"])
def test_bytes_cut_anywhere_show_as_they_do_whole(parts):
    assert "".join(printable_stream(parts)) == printable(b"".join(parts))


@given(st.binary())
def test_any_bytes_become_text_that_cannot_steer_a_terminal(data):
    shown = printable(data)
    assert all(letter.isprintable() or letter in "\n\t" for letter in shown)
    shown.encode()  # no lone surrogates


@given(VISIBLE)
def test_text_is_shown_as_it_is(text):
    assert printable(text.encode()) == text


@given(VISIBLE, VISIBLE)
def test_what_is_not_text_becomes_escapes_between_the_text(before, after):
    data = before.encode() + b"\xff\x1b\x00" + after.encode()
    assert printable(data) == before + r"\xff\x1b\x00" + after


def test_a_letter_comes_with_its_last_byte_and_a_cut_one_at_the_end():
    data = [bytes([byte]) for byte in "é∑".encode() + b"\xe2\x88"]
    assert list(printable_stream(data)) == ["", "é", "", "", "∑", "", "", r"\xe2\x88"]


@pytest.mark.parametrize("document", [b"\xff\xfe a", b"a\0b", b"\xc3a"])
def test_what_is_not_text_has_no_words(document):
    assert text.count_words(runs.corpus_of(b"some text", document)) == 0


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_words_are_counted_the_same_in_pieces_and_in_cut_text(letters, piece_size, cut):
    whole = f"é{letters}é".encode()  # a cut leaves part of a letter at either end
    data = whole[cut // 2 : len(whole) - cut % 2]
    made = text._count_words(np.frombuffer(data, np.uint8), piece_size)
    assert made == len(data.split())
