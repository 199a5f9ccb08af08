import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.data.splits import split_corpus
from megabyte_jax.errors import UserError

SPLITS = ("train", "valid", "test")


def corpus_of(documents: dict[str, bytes]) -> Corpus:
    views = {name: np.frombuffer(data, np.uint8) for name, data in documents.items()}
    return Corpus("c", tuple(Document(n, view, 0, len(view)) for n, view in views.items()))


def bytes_of(corpus: Corpus) -> bytes:
    return b"".join(document.data.tobytes() for document in corpus)


def split_all(corpus: Corpus, **options) -> list[Corpus]:
    return [split_corpus(corpus, split, **options) for split in SPLITS]


def sized(size: int) -> Corpus:
    return Corpus("c", (Document("d", np.broadcast_to(np.uint8(0), size), 0, size),))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=9), min_size=1, max_size=9), st.data())
def test_a_split_by_bytes_cuts_the_stream_in_order(documents, data):
    corpus = corpus_of({f"{i}": document for i, document in enumerate(documents)})
    assume(corpus.num_bytes >= 3)
    valid = data.draw(st.integers(1, corpus.num_bytes - 2))
    test = data.draw(st.integers(1, corpus.num_bytes - 1 - valid))
    parts = split_all(corpus, by="bytes", valid_size=valid, test_size=test)
    assert [part.num_bytes for part in parts[1:]] == [valid, test]
    assert b"".join(map(bytes_of, parts)) == b"".join(documents)
    assert all(len(document) for part in parts for document in part)


@pytest.mark.parametrize(
    ("total", "valid", "test", "expected"),
    [
        (100_000_000, 0.05, 0.05, [90_000_000, 5_000_000, 5_000_000]),
        (4_154_399, 204_800, 49_599, [3_900_000, 204_800, 49_599]),
        (1000, 0.3, 1, [699, 300, 1]),
    ],
)
def test_a_split_by_bytes_has_the_exact_sizes(total, valid, test, expected):
    parts = split_all(sized(total), by="bytes", valid_size=valid, test_size=test)
    assert [part.num_bytes for part in parts] == expected


def test_parts_can_be_cut_again():
    corpus = corpus_of({"a": b"0123456789"})
    train = split_corpus(corpus, "train", by="bytes", valid_size=2, test_size=2)
    valid = split_corpus(train, "valid", by="bytes", valid_size=2, test_size=1)
    assert bytes_of(valid) == b"34"


@settings(deadline=None, max_examples=50)
@given(st.sets(st.text(), min_size=40, max_size=60), st.text())
def test_a_split_by_document_is_disjoint_complete_and_stable(names, added):
    options = {"by": "document", "valid_size": 0.3, "test_size": 0.3}
    corpus = corpus_of({name: b"1" for name in names})
    larger = corpus_of({name: b"1" for name in names | {added}})
    parts = [{d.name for d in part} for part in split_all(corpus, **options)]
    assert sum(map(len, parts)) == len(names) and set.union(*parts) == names
    for before, after in zip(parts, split_all(larger, **options), strict=True):
        assert {document.name for document in after} - before <= {added}


def test_a_split_by_document_has_about_the_sizes_and_never_changes():
    corpus = corpus_of({f"{i}.txt": b"1" for i in range(10_000)})
    parts = split_all(corpus, by="document", valid_size=0.05, test_size=0.1)
    np.testing.assert_allclose([len(part) for part in parts], [8500, 500, 1000], atol=90)
    # Which documents are held out must survive upgrades: these are part of the format.
    assert [d.name for d in parts[1]][:3] == ["13.txt", "50.txt", "62.txt"]
    assert [d.name for d in parts[2]][:3] == ["14.txt", "48.txt", "68.txt"]


def test_a_split_by_name_follows_the_folders():
    corpus = corpus_of({"train/a": b"1", "val/b": b"2", "validation/c/d": b"3", "x/test/e": b"4"})
    options = {"by": "name", "valid_size": 0.0, "test_size": 0.0}
    assert bytes_of(split_corpus(corpus, "train", **options)) == b"1"
    assert bytes_of(split_corpus(corpus, "valid", **options)) == b"23"
    with pytest.raises(UserError, match="the test split of 'c' is empty; .* sub-folder test"):
        split_corpus(corpus, "test", **options)
    assert bytes_of(split_corpus(corpus, "test", **options, test="x")) == b"4"
    assert bytes_of(split_corpus(corpus, "valid", **options, valid="val")) == b"2"


@pytest.mark.parametrize("by", ["document", "bytes"])
@pytest.mark.parametrize("option", ["valid_size", "test_size"])
@pytest.mark.parametrize("size", [float("nan"), float("inf"), -0.1, -1, 1.5])
def test_a_size_out_of_range_is_an_error(by, option, size):
    sizes = {"valid_size": 0.1, "test_size": 0.1, option: size}
    with pytest.raises(UserError, match=f"^data.split.{option}={size}: accepted: "):
        split_corpus(sized(10), "train", by=by, **sizes)


@pytest.mark.parametrize(
    ("by", "valid", "test"), [("document", 0.5, 0.5), ("bytes", 0.5, 0.5), ("bytes", 9, 2)]
)
def test_sizes_that_leave_nothing_to_train_on_are_an_error(by, valid, test):
    with pytest.raises(
        UserError, match=f"data.split.valid_size={valid} and data.split.test_size={test}: "
    ):
        split_corpus(sized(10), "valid", by=by, valid_size=valid, test_size=test)


@pytest.mark.parametrize("by", ["document", "bytes"])
def test_an_empty_split_is_an_error_that_says_what_to_change(by):
    with pytest.raises(
        UserError, match=f"split.by='{by}': the valid .*another data.split.valid_size"
    ):
        split_corpus(sized(10), "valid", by=by, valid_size=0.0, test_size=0.0)


def test_an_unknown_way_to_split_is_an_error():
    with pytest.raises(UserError, match="data.split.by='x': .*accepted: document, bytes, name"):
        split_corpus(sized(10), "train", by="x", valid_size=0.0, test_size=0.0)
