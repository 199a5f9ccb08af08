import functools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data.corpus import Corpus, Document, open_corpus
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


@pytest.mark.parametrize("unit", [1, 2, 6, 12])
def test_windows_of_units_begin_where_a_unit_begins(unit):
    windows = TrainWindows(corpus_of(bytes(range(240))), 12, 20, seed=0, unit=unit)
    starts = np.concatenate([windows.batch(step)[:, 0] for step in range(40)])
    assert (starts % unit == 0).all()
    assert len({*starts.tolist()}) == 240 // unit  # and at each of them in some epoch


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


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.binary(min_size=1, max_size=20), min_size=T, max_size=9 * T),
    st.binary(min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_a_separator_follows_every_document_of_the_stream(documents, separator, step):
    windows = TrainWindows(corpus_of(*documents), T, 8, seed=3, separator=separator)
    stream = b"".join(document + separator for document in documents)
    assert windows.num_bytes == len(stream)
    for row in windows.batch(step):
        assert row.tobytes() in 2 * stream


@pytest.mark.parametrize("workers", range(9))
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_workers_and_hosts_give_the_same_batches_from_any_step(tmp_path, workers, hosts):
    (tmp_path / "a").write_bytes(np.random.default_rng(0).bytes(50_000))
    windows = TrainWindows(open_corpus(str(tmp_path)), 700, 8, seed=3)
    expected = [windows.batch(step) for step in range(30)]
    for first in (0, 13):
        steps = range(first, 30)
        parts = [
            prefetch(functools.partial(windows.batch, host=host, num_hosts=hosts), steps, workers)
            for host in range(hosts)
        ]
        for step, rows in zip(steps, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(rows), expected[step])


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
    for x, scored, docs, _, lengths in eval_batches(
        corpus, eval_windows(corpus, T, T), batch_size, T
    ):
        assert (x.shape, x.dtype, scored.shape) == ((batch_size, T), np.uint8, (batch_size, T))
        assert lengths.shape == docs.shape == (batch_size,)
        for row, mask, length, doc in zip(x, scored, lengths, docs, strict=True):
            assert not row[length:].any() and mask[:length].all() and not mask[length:].any()
            seen[doc] += row[:length].tobytes()
    assert seen == documents


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 8), st.integers(1, 6), st.booleans(), st.integers(1, 5))
def test_overlapping_windows_score_every_byte_once(data, patch_size, K, strided, batch_size):
    seq_len, shift = K * patch_size, patch_size // 2 if strided and patch_size % 2 == 0 else 0
    stride = data.draw(st.integers(1, K)) * patch_size
    sizes = data.draw(st.lists(st.integers(0, 5 * seq_len), max_size=8))
    documents = [np.random.default_rng(size).bytes(size) for size in sizes]
    corpus, times = corpus_of(*documents), [np.zeros(size, int) for size in sizes]
    table = eval_windows(corpus, seq_len, stride, shift)
    for batch in eval_batches(corpus, table, batch_size, seq_len, shift):
        for x, scored, document, start, length in zip(*batch, strict=True):
            assert documents[document][start : start + length] == x[:length].tobytes()
            assert length in (0, min(seq_len, sizes[document] - start)) and not x[length:].any()
            np.add.at(times[document], start + np.flatnonzero(scored), 1)
            # All that is computed is for something.
            assert scored.any() == (length > 0)
    assert all((count == 1).all() for count in times)


def test_evaluation_windows_begin_at_the_start_of_each_document():
    table = eval_windows(corpus_of(b"", b"a" * 5, b"", b"b" * 4, b"c"), 4, 4)
    assert table.dtype == np.int64
    assert table[:, :3].tolist() == [[1, 0, 4], [1, 4, 1], [3, 0, 4], [4, 0, 1]]
    assert (table[:, 3] == 0).all() and (table[:, 4] == table[:, 2]).all()


def test_sliding_windows_score_what_none_before_them_held():
    table = eval_windows(corpus_of(b"a" * 21, b"b" * 12, b"c" * 13), 12, 4)
    assert table.tolist() == [
        [0, 0, 12, 0, 12],
        [0, 4, 12, 8, 12],
        [0, 8, 12, 8, 12],
        [0, 12, 9, 8, 9],
        [1, 0, 12, 0, 12],
        [2, 0, 12, 0, 12],
        [2, 4, 9, 8, 9],
    ]


@pytest.mark.parametrize("size, shifted", [(4, []), (6, []), (7, [[0, 2, 5, 4, 5]])])
def test_a_document_of_a_patch_and_a_half_needs_no_shifted_window(size, shifted):
    table = eval_windows(corpus_of(b"a" * size), 12, 12, shift=2)
    assert table.tolist() == [[0, 0, size, 0, size], *shifted]


def test_strided_windows_score_the_first_halves_of_patches_and_all_of_the_first():
    corpus = corpus_of(bytes(range(25)))
    table = eval_windows(corpus, 12, 12, shift=2)
    (batch,) = eval_batches(corpus, table, 5, 12, shift=2)
    scored = [row[mask].tolist() for row, mask in zip(batch.x, batch.scored, strict=True)]
    first, second, third = [0, 1, 2, 3, 4, 5, 8, 9], [12, 13, 14, 15, 16, 17, 20, 21], [24]
    assert scored == [first, second, third, [6, 7, 10, 11], [18, 19, 22, 23]]
    assert batch.starts.tolist() == [0, 12, 24, 2, 14]
    assert batch.lengths.tolist() == [12, 12, 1, 12, 11]


def test_documents_without_a_byte_give_no_batch():
    corpus = corpus_of(b"", b"")
    for shift in (0, 2):
        table = eval_windows(corpus, T, T, shift)
        assert table.shape == (0, 5)
        assert list(eval_batches(corpus, table, 2, T, shift)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_gives_the_results_in_order(workers):
    assert list(prefetch(lambda step: step**2, range(2, 7), workers)) == [4, 9, 16, 25, 36]
    assert list(prefetch(lambda step: step, [], workers)) == []
    assert list(prefetch(lambda step: step, iter("a"), workers)) == ["a"]


@pytest.mark.parametrize("workers", [1, 2])
def test_prefetch_works_ahead_of_the_consumer(workers):
    started = [threading.Event() for _ in range(2 * workers + 2)]
    batches = prefetch(lambda step: started[step].set(), range(len(started)), workers)
    next(batches)
    assert all(event.wait(10) for event in started[:-1])
    assert not started[-1].wait(0.05)
    batches.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_raises_at_the_turn_of_the_step_that_failed(workers):
    batches = prefetch(lambda step: 1 // (2 - step), range(4), workers)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_ends_its_thread_when_closed():
    batches = prefetch(lambda step: threading.current_thread(), range(1000), 1)
    thread = next(batches)
    assert thread.is_alive() and thread is not threading.current_thread()
    batches.close()
    assert not thread.is_alive()


def test_without_workers_nothing_is_computed_ahead():
    seen = []
    batches = prefetch(seen.append, range(5), 0)
    next(batches)
    assert seen == [0]
