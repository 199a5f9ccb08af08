"""Which bytes a batch holds: shuffled windows to train on, every byte once to evaluate.

Letters: B batch, T bytes of a window, N windows.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megabyte_jax.data.corpus import Corpus
from megabyte_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def permute(index: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Sends each index to its place in a pseudo-random order of [0, n), storing no table.

    A Feistel network on pairs of [0, a) x [0, b), the smallest near-square rectangle that holds n
    (Black and Rogaway 2002). The few results beyond n go through it again until they fall inside.

    Args:
        index: int64[...] in [0, n).
        n: How many there are, 1 <= n < 2**62.
        key: Which order, 0 <= key < 2**64.

    Returns:
        int64 of the shape of `index`; a bijection of [0, n) for every n and key.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _mix(np.uint64(key) + np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    result = index.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = np.divmod(result[outside], np.uint64(b))
        for left_key, right_key in keys.reshape(3, 2):
            # Half of the range of the mixed bits, because a sum that wraps would not be invertible.
            left = (left + (_mix(right ^ left_key) >> np.uint64(1))) % a
            right = (right + (_mix(left ^ right_key) >> np.uint64(1))) % b
        result[outside] = left * b + right
        outside = result >= n
    return result.astype(np.int64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class TrainWindows:
    """Windows of the documents packed into one circular stream, in an order drawn per epoch.

    An epoch visits `num_windows` disjoint windows, each once, from an offset of its own, so that
    windows begin elsewhere in every epoch and no byte is always left out. Nothing is stored: a
    batch is a function of the seed and the step.

    Attributes:
        corpus: The documents, concatenated.
        seq_len: T, bytes of a window.
        batch_size: B, windows of a step over all hosts.
        seed: At least 0.
        unit: Bytes of an image or a sample. Where T is a multiple of it and documents are, windows
            begin where one begins.
        separator: What stands after each document.

    Raises:
        UserError: The corpus is shorter than one window.
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    seed: int
    unit: int = 1
    separator: bytes = b""

    def __post_init__(self) -> None:
        """Checks that there is a window."""
        if self.num_bytes < self.seq_len:
            raise UserError(
                f"data.source: {self.corpus.name!r} has {self.num_bytes} bytes to train on, "
                f"fewer than model.seq_len={self.seq_len}; accepted: more data or shorter sequences"
            )

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document begins in the stream, then the end of it: int64[documents + 1]."""
        if not self.separator:
            return self.corpus.offsets
        return self.corpus.offsets + np.arange(len(self.corpus) + 1) * len(self.separator)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stream."""
        return int(self.offsets[-1])

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return self.num_bytes // self.seq_len

    def batch(self, step: int, host: int = 0, num_hosts: int = 1) -> NDArray[np.uint8]:
        """Returns uint8[B / num_hosts, T], the rows of one host in the batch of a step.

        Raises:
            UserError: The hosts cannot share the batch equally.
        """
        if self.batch_size % num_hosts:
            raise UserError(
                f"train.batch_size={self.batch_size}: does not divide among {num_hosts} hosts; "
                f"accepted: a multiple of {num_hosts}"
            )
        count = self.batch_size // num_hosts
        return self.rows(step, host * count, count)

    def rows(self, step: int, first: int, count: int) -> NDArray[np.uint8]:
        """Returns uint8[count, T], rows of the batch of a step."""
        first += step * self.batch_size
        starts = self._starts(np.arange(first, first + count, dtype=np.int64))
        out = np.empty((count, self.seq_len), np.uint8)
        for row, start in zip(out, starts.tolist(), strict=True):
            self._read(start, row)
        return out

    def starts(self, step: int) -> NDArray[np.int64]:
        """Returns int64[B], where in the stream the windows in the batch of a step begin."""
        first = step * self.batch_size
        return self._starts(np.arange(first, first + self.batch_size, dtype=np.int64))

    def _starts(self, sample: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns where in the stream the windows of these samples begin."""
        epochs, windows = np.divmod(sample, self.num_windows)
        starts = np.empty_like(sample)
        for epoch in np.unique(epochs).tolist():
            # A SeedSequence gives the same bits in every version of NumPy; a Generator need not.
            key, offset = np.random.SeedSequence((self.seed, epoch)).generate_state(2, np.uint64)
            here = epochs == epoch
            places = permute(windows[here], self.num_windows, int(key)) * self.seq_len
            first = int(offset) % self.num_bytes // self.unit * self.unit
            starts[here] = (places + first) % self.num_bytes
        return starts

    def _read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fills `out` with the bytes from `start` of the circular stream."""
        if not self.separator:
            before = out[: self.num_bytes - start]
            self.corpus.read(start, before)
            self.corpus.read(0, out[len(before) :])
            return
        number = int(np.searchsorted(self.offsets, start, side="right")) - 1
        place = start - int(self.offsets[number])
        while len(out):
            document = self.corpus.documents[number]
            if place < len(document):
                piece = out[: len(document) - place]
                document.read(place, piece)
                out, place = out[len(piece) :], place + len(piece)
            after = self.separator[place - len(document) :][: len(out)]
            out[: len(after)] = np.frombuffer(after, np.uint8)
            out = out[len(after) :]
            number, place = (number + 1) % len(self.corpus), 0


def eval_windows(corpus: Corpus, seq_len: int, stride: int, shift: int = 0) -> NDArray[np.int64]:
    """Cuts each document into windows that overlap or not and say which bytes count where.

    The windows of a document of n bytes begin at 0, stride, 2 stride, ... until one reaches its
    end: none if n = 0, one if n <= T, else 1 + ceil((n - T) / stride), of which the last may be
    shorter. The first counts all its bytes, each later one those that no window before it held.

    With a shift, which is half a patch, the windows that begin `shift` bytes later follow all
    these, and of either kind only some bytes count; see `eval_batches`. A shifted window of which
    none would count is left out.

    Args:
        corpus: The documents.
        seq_len: T.
        stride: From 1 to T, in bytes; a multiple of 2 shift.
        shift: Half a patch in bytes, or 0.

    Returns:
        int64[N, 5]: document, start in it, length, then the first position of the window that may
        count and the one after the last. All in bytes.
    """
    sizes = np.diff(corpus.offsets)
    counts = np.where(sizes, 1 + np.maximum(-(-(sizes - seq_len) // stride), 0), 0)
    document = np.repeat(np.arange(len(corpus)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = index * stride
    left = sizes[document] - start
    length = np.minimum(left, seq_len)
    first = np.where(index, seq_len - stride, 0)
    table = np.stack([document, start, length, first, length], axis=1)
    if not shift:
        return table
    # The first patch of a shifted window has nothing at all before it, so none of it counts.
    first, stop = np.maximum(first, 2 * shift), length - shift
    columns = [document, start + shift, np.minimum(left - shift, seq_len), first, stop]
    shifted = np.stack(columns, axis=1)
    return np.concatenate([table, shifted[first < stop]])


class EvalBatch(NamedTuple):
    """Windows that are evaluated together.

    Attributes:
        x: uint8[B, T], zero past the end of a window.
        scored: bool[B, T], which bytes count.
        documents: int64[B], that the windows are of.
        starts: int64[B], where in their documents they begin.
        lengths: int64[B], their bytes; 0 in the rows that fill up the last batch.
    """

    x: NDArray[np.uint8]
    scored: NDArray[np.bool_]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def eval_batches(
    corpus: Corpus, table: NDArray[np.int64], batch_size: int, seq_len: int, shift: int = 0
) -> Iterator[EvalBatch]:
    """Yields the windows of a table from `eval_windows`, in its order.

    With a shift, the bytes of the first half of each patch count, and those of the whole first one.
    The second halves of the other patches of a window are the first halves in the shifted one.
    """
    position = np.arange(seq_len)
    kept = np.ones(seq_len, bool)
    if shift:
        kept = (position < 2 * shift) | (position % (2 * shift) < shift)
    for row in range(0, len(table), batch_size):
        x = np.zeros((batch_size, seq_len), np.uint8)
        rows = np.zeros((batch_size, table.shape[1]), np.int64)
        rows[: len(table) - row] = table[row : row + batch_size]
        documents, starts, lengths, firsts, stops = rows.T
        scored = kept & (position >= firsts[:, None]) & (position < stops[:, None])
        for out, document, start, length in zip(x, documents, starts, lengths, strict=True):
            if length:
                corpus.documents[document].read(start, out[:length])
        yield EvalBatch(x, scored, documents, starts, lengths)


def prefetch(
    fn: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yields `fn` of each item in order, computed ahead in threads, two items for each of them.

    What `fn` raises is raised here, at its turn. The threads end with the iterator.

    Args:
        fn: safe to call from several threads at once.
        items: taken one by one as results are.
        workers: threads; with none the results are computed when they are asked for.
    """
    if not workers:
        yield from map(fn, items)
        return
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="prefetch")
    try:
        items = iter(items)
        ahead = deque(pool.submit(fn, item) for item in islice(items, 2 * workers))
        while ahead:
            future = ahead.popleft()
            ahead.extend(pool.submit(fn, item) for item in islice(items, 1))
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
