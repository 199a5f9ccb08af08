"""Bits per byte of documents: every byte of every document scored once."""

from __future__ import annotations

import codecs
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.windows import eval_batches, eval_windows
from megabyte_jax.models import megabyte
from megabyte_jax.models.config import MegabyteConfig

nll = jax.jit(megabyte.nll, static_argnums=0)

_CONTINUATIONS = bytes(range(0x80, 0xC0))  # the bytes of a letter in UTF-8 after its first


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Summed losses of documents.

    Attributes:
        nats: float64 [N], negative log-likelihood of each document.
        sizes: int64 [N], bytes of each that were scored.
        position_nats: float64 [P], losses summed by position in the patch.
        position_sizes: int64 [P], bytes at each position.
        bytes_per_second: speed after the first batch, which compiles; NaN if it was the only one.
    """

    nats: NDArray[np.float64]
    sizes: NDArray[np.int64]
    position_nats: NDArray[np.float64]
    position_sizes: NDArray[np.int64]
    bytes_per_second: float

    @property
    def bytes(self) -> int:
        """Bytes scored."""
        return int(self.sizes.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte over all bytes; NaN if there are none."""
        return _ratio(self.nats.sum(), self.bytes)

    @property
    def bits_per_byte_stderr(self) -> float:
        """Standard error of bits_per_byte as a ratio over documents; NaN below two documents."""
        n = int((self.sizes > 0).sum())
        if n < 2:
            return math.nan
        residuals = self.nats / math.log(2) - self.bits_per_byte * self.sizes
        return math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) / self.bytes

    @property
    def bits_per_byte_by_position(self) -> list[float]:
        """Bits per byte at each position in the patch, P of them (figure 5 of the paper)."""
        return [_ratio(*pair) for pair in zip(self.position_nats, self.position_sizes, strict=True)]


def _ratio(nats: float, count: int) -> float:
    return float(nats) / math.log(2) / int(count) if count else math.nan


def score(
    config: MegabyteConfig, params: megabyte.Params, corpus: Corpus, batch_size: int, limit: int = 0
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]]:
    """Scores documents, each cut into windows of seq_len bytes from its own start.

    This is the strategy `basic`: a byte is predicted from the bytes before it in its window.

    Args:
        config: the model.
        params: its parameters.
        corpus: the documents.
        batch_size: windows computed together.
        limit: if not 0, only as many windows as hold about this many bytes, taken evenly from the
            whole corpus.

    Yields:
        Of each batch: negative log-likelihoods float32 [B, T] in nats, of which those from the
        length on mean nothing; the lengths int32 [B]; the numbers of the documents int32 [B].
    """
    table = eval_windows(corpus, config.seq_len)
    if limit and limit < corpus.num_bytes:
        count = max(1, math.ceil(len(table) * limit / corpus.num_bytes))
        table = table[np.linspace(0, len(table) - 1, count).astype(np.int64)]
    batch_size = max(1, min(batch_size, len(table)))
    for x, lengths, documents in eval_batches(corpus, table, batch_size, config.seq_len):
        yield np.asarray(nll(config, params, x)), lengths, documents


def evaluate(
    config: MegabyteConfig, params: megabyte.Params, corpus: Corpus, batch_size: int, limit: int = 0
) -> Evaluation:
    """Evaluates a model on documents.

    Args:
        config: the model.
        params: its parameters.
        corpus: the documents.
        batch_size: windows computed together.
        limit: see `score`.
    """
    P = config.patch_size
    nats, sizes = np.zeros(len(corpus)), np.zeros(len(corpus), np.int64)
    position_nats, position_sizes = np.zeros(P), np.zeros(P, np.int64)
    start, first = math.nan, 0
    total = min(limit or corpus.num_bytes, corpus.num_bytes)
    bar = tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)
    for losses, lengths, documents in score(config, params, corpus, batch_size, limit):
        bar.update(int(lengths.sum()))
        if math.isnan(start):
            start, first = time.perf_counter(), int(lengths.sum())
        scored = np.arange(losses.shape[1]) < lengths[:, None]  # [B, T], by position, not value
        masked = np.where(scored, losses.astype(np.float64), 0.0)
        np.add.at(nats, documents, masked.sum(axis=1))
        np.add.at(sizes, documents, lengths)
        position_nats += masked.reshape(-1, P).sum(axis=0)
        position_sizes += scored.reshape(-1, P).sum(axis=0)
    bar.close()
    rest = int(sizes.sum()) - first
    speed = rest / (time.perf_counter() - start) if rest else math.nan
    return Evaluation(nats, sizes, position_nats, position_sizes, speed)


def count_words(corpus: Corpus) -> int:
    """Counts the words of a corpus of text, as runs of bytes between white space.

    Args:
        corpus: the documents.

    Returns:
        Their number; 0 if a document is not text, which is UTF-8 without a NUL byte. A letter cut
        by either end of a document, as a split by bytes may, is no objection.
    """
    try:
        return sum(_count_words(document.data) for document in corpus)
    except UnicodeDecodeError:
        return 0


def _count_words(data: NDArray[np.uint8], piece_size: int = 2**20) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    words, inside = 0, False
    for start in range(0, len(data), piece_size):
        piece = data[start : start + piece_size].tobytes()
        if b"\0" in piece:
            raise UnicodeDecodeError("utf-8", piece, 0, 1, "NUL is not text")
        decoder.decode(piece if start else piece[:3].lstrip(_CONTINUATIONS) + piece[3:])
        words += len(piece.split()) - (inside and not piece[:1].isspace())
        inside = not piece[-1:].isspace()
    return words


def _or_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(evaluation: Evaluation, *, words: int, context: int, **protocol: Any) -> dict[str, Any]:
    """What an evaluation writes to JSON: its figures and the protocol they hold for.

    Args:
        evaluation: of whole documents.
        words: of the documents if they are text, else 0.
        context: T in bytes.
        **protocol: dataset, split, step and the like, as they are to appear.

    Returns:
        Field to value; None where there is no such figure, which JSON has and NaN it has not.
    """
    with np.errstate(over="ignore"):  # one "word" of a thousand bytes is enough
        perplexity = float(np.exp(evaluation.nats.sum() / words)) if words else math.nan
    fields = {
        "bits_per_byte": evaluation.bits_per_byte,
        "bits_per_byte_stderr": evaluation.bits_per_byte_stderr,
        "bytes": evaluation.bytes,
        "documents": int(len(evaluation.sizes)),
        "words": words or math.nan,
        "word_perplexity": perplexity,
        "bytes_per_second": evaluation.bytes_per_second,
        "bits_per_byte_by_position": evaluation.bits_per_byte_by_position,
        "context": context,
        "strategy": "basic",
        "stride": context,
        **protocol,
    }
    return {name: _or_none(value) for name, value in fields.items()}
