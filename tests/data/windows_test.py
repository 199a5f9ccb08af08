import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.data.windows import TrainWindows, eval_batches, eval_windows, permute, prefetch
from megabyte_jax.errors import UserError

P, T = 3, 12


def corpus_of(*documents: bytes) -> Corpus:
    views = [np.frombuffer(data, np.uint8) for data in documents]
    return Corpus("c", tuple(Document(f"{i}", v, 0, len(v)) for i, v in enumerate(views)))


def cut(data: bytes, sizes: list[int]) -> Corpus:
    ends = np.minimum(np.cumsum([0, *sizes]), len(data)).tolist() + [len(data)]
    return corpus_of(*(data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)))


@settings(deadline=None, max_examples=200)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    out = permute(np.arange(n), n, key)
    assert out.dtype == np.int64
    np.testing.assert_array_equal(np.sort(out), np.arange(n))


@settings(deadline=None)
@given(st.integers(1, 2**61), st.integers(0, 2**64 - 1), st.data())
def test_permute_of_many_stays_inside_and_apart(n, key, data):
    index = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=50))
    out = permute(np.array(index, np.int64), n, key)
    assert ((0 <= out) & (out < n)).all() and len(set(out.tolist())) == len(index)


def test_permute_looks_random():
    n = 10_007
    for key in range(20):
        out = permute(np.arange(n), n, key)
        # Standard deviation of a rank correlation is 1 / sqrt(n) = 0.01; fixed points average 1.
        assert abs(np.corrcoef(out, np.arange(n))[0, 1]) < 0.05
        assert abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 0.05
        assert (out == np.arange(n)).sum() < 8


@settings(deadline=None, max_examples=60)
@given(st.integers(T, 200), st.integers(1, 7), st.integers(0, 9), st.lists(st.integers(0, 40)))
def test_an_epoch_visits_disjoint_windows_of_the_stream(total, batch_size, seed, sizes):
    corpus = cut(bytes(range(total)), sizes)  # the value of a byte is its position
    windows = TrainWindows(corpus, T, batch_size, seed)
    n = windows.num_windows
    rows = np.concatenate([windows.batch(step) for step in range(-(-3 * n // batch_size))])
    for epoch in range(3):
        seen = rows[epoch * n : (epoch + 1) * n]
        assert len(set(seen.ravel().tolist())) == n * T == total // T * T
        steps = np.diff(seen.astype(int), axis=1) % total
        assert (steps == 1 % total).all()


def test_epochs_differ_in_their_order_and_their_borders():
    windows = TrainWindows(corpus_of(bytes(range(250))), 10, 25, seed=0)
    first, second = windows.batch(0)[:, 0], windows.batch(1)[:, 0]
    assert {*first.tolist()} != {*second.tolist()}
    assert len({*np.diff(first).tolist()}) > 5
    assert (first != TrainWindows(windows.corpus, 10, 25, seed=1).batch(0)[:, 0]).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(T, 100), st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]))
def test_the_global_batch_is_the_same_for_any_number_of_hosts(total, step, hosts):
    windows = TrainWindows(corpus_of(bytes(range(total))), T, 8, seed=3)
    parts = [windows.batch(step, host, hosts) for host in range(hosts)]
    assert all(part.shape == (8 // hosts, T) and part.dtype == np.uint8 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), windows.batch(step))


def test_the_batch_of_a_step_never_changes():
    windows = TrainWindows(corpus_of(bytes(range(100))), 5, 4, seed=7)
    # A run that resumes after an upgrade must see the same bytes: these are part of the format.
    assert windows.batch(0)[:, 0].tolist() == [70, 65, 80, 45]
    assert windows.batch(1234)[:, 0].tolist() == [4, 79, 44, 94]


def test_a_corpus_shorter_than_a_sequence_is_an_error():
    TrainWindows(corpus_of(b"12", b"3"), 3, 1, 0)
    with pytest.raises(
        UserError, match="data.source: 'c' has 3 bytes .* model.seq_len=4; accepted"
    ):
        TrainWindows(corpus_of(b"12", b"3"), 4, 1, 0)


def test_a_batch_that_hosts_cannot_share_is_an_error():
    with pytest.raises(
        UserError, match="train.batch_size=6: .* 4 hosts; accepted: a multiple of 4"
    ):
        TrainWindows(corpus_of(b"123"), 3, 6, 0).batch(0, 0, 4)


EDGES = [0, 1, P - 1, P, P + 1, T - 1, T, T + 1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5 * T), max_size=30), st.integers(1, 5), st.randoms())
def test_evaluation_sees_every_byte_of_every_document_once(sizes, batch_size, random):
    documents = [random.randbytes(size) for size in EDGES + sizes]
    corpus = corpus_of(*documents)
    seen = [b""] * len(documents)
    for x, lengths, docs in eval_batches(corpus, eval_windows(corpus, T), batch_size, T):
        assert (x.shape, x.dtype) == ((batch_size, T), np.uint8)
        assert lengths.dtype == docs.dtype == np.int32 and lengths.shape == docs.shape
        for row, length, doc in zip(x, lengths, docs, strict=True):
            assert not row[length:].any()
            seen[doc] += row[:length].tobytes()
    assert seen == documents


def test_evaluation_windows_begin_at_the_start_of_each_document():
    table = eval_windows(corpus_of(b"", b"a" * 5, b"", b"b" * 4, b"c"), 4)
    assert table.dtype == np.int64
    assert table.tolist() == [[1, 0, 4], [1, 4, 1], [3, 0, 4], [4, 0, 1]]


def test_documents_without_a_byte_give_no_batch():
    corpus = corpus_of(b"", b"")
    table = eval_windows(corpus, T)
    assert table.shape == (0, 3)
    assert list(eval_batches(corpus, table, 2, T)) == []


def test_prefetch_gives_the_results_in_order():
    assert list(prefetch(lambda step: step**2, 2, 7)) == [4, 9, 16, 25, 36]
    assert list(prefetch(lambda step: step, 3, 3)) == []
    assert list(prefetch(lambda step: step, 3, 4)) == [3]


def test_prefetch_works_ahead_of_the_consumer():
    started = [threading.Event() for _ in range(4)]
    batches = prefetch(lambda step: started[step].set(), 0, 4)
    next(batches)
    assert started[1].wait(10) and started[2].wait(10)
    assert not started[3].wait(0.05)
    batches.close()


def test_prefetch_raises_at_the_turn_of_the_step_that_failed():
    batches = prefetch(lambda step: 1 // (2 - step), 0, 4)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_ends_its_thread_when_closed():
    batches = prefetch(lambda step: threading.current_thread(), 0, 1000)
    thread = next(batches)
    assert thread.is_alive() and thread is not threading.current_thread()
    batches.close()
    assert not thread.is_alive()
