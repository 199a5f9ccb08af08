"""Bits per byte of documents: every byte of every document scored once.

A byte is predicted from the bytes before it in a window of at most T = seq_len bytes of its own
document. The strategies differ in which window that is:

- basic: the windows begin at 0, T, 2 T, ... of the document.
- sliding (Press et al. 2021): they begin at 0, S, 2 S, ... with a stride S of at most T, until one
  reaches the end. The first scores all its bytes, each later one those that no window before it
  held: its last S, fewer at the end of the document.
- strided (section 2.3.3 of the paper): two passes, the windows of `basic` and the same begun P / 2
  bytes later, cut only by the end of the document. Of each patch of either pass only the first
  P / 2 bytes are scored, except that the first patch of a window is scored whole in the first pass
  and not at all in the shifted one, where nothing is before it: the P / 2 bytes that precede a
  shifted window are no part of it and no padding stands for them. This pays where the loss rises
  within a patch, as in the paper; where it falls (`bits_per_byte_by_position` of `basic` tells), it
  does harm.
- sliding_strided: the windows of `sliding`, in the two passes of `strided`.

No window reaches beyond its document: one of n <= T bytes is a single window (with the strided ones
a second if n > 3 P / 2, as no byte of it would be scored otherwise), the empty one none. On long
documents the model sees each byte about 1, T / S, 2 and 2 T / S times (`cost_factor`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megabyte_jax import distributed, sharding
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.windows import EvalBatch, eval_batches, eval_windows
from megabyte_jax.errors import UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import ModelConfig

nll = jax.jit(functional.nll, static_argnums=0)

STRATEGIES = ("basic", "sliding", "strided", "sliding_strided")

_MAX_BINS = 1024  # of the losses by position in the context


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Summed losses of documents.

    The position of a byte, in its patch and in the context, is the one that it has in the window
    that scored it.

    Attributes:
        nats: float64 [N], negative log-likelihood of each document.
        sizes: int64 [N], bytes of each that were scored.
        context_nats: float64 [T], losses summed by position in the context.
        context_sizes: int64 [T], bytes scored at each position.
        patch_size: P in bytes.
        model_bytes: bytes of all the windows, which the model was run on.
        strategy: one of `STRATEGIES`.
        stride: bytes from one window to the next.
        bytes_per_second: bytes scored, after the first batch, which compiles; NaN if it was the
            only one.
    """

    nats: NDArray[np.float64]
    sizes: NDArray[np.int64]
    context_nats: NDArray[np.float64]
    context_sizes: NDArray[np.int64]
    patch_size: int
    model_bytes: int
    strategy: str
    stride: int
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
    def cost_factor(self) -> float:
        """Bytes that the model was run on for each byte scored; NaN if there are none."""
        return self.model_bytes / self.bytes if self.bytes else math.nan

    @property
    def bits_per_byte_by_position(self) -> list[float]:
        """Bits per byte at each position in the patch, P of them (figure 5 of the paper).

        With the strided strategies the second half is that of the first patches of windows alone.
        """
        pairs = [a.reshape(-1, self.patch_size).sum(axis=0) for a in self._by_context]
        return list(map(_ratio, *pairs))

    @property
    def context_bin(self) -> int:
        """Bytes of one entry of `bits_per_byte_by_context`, the least for at most 1,024 of them."""
        return -(-len(self.context_nats) // _MAX_BINS)

    @property
    def bits_per_byte_by_context(self) -> list[float]:
        """Bits per byte by position in the context, from the first on (figure 4 of the paper)."""
        edges = np.arange(0, len(self.context_nats), self.context_bin)
        return list(map(_ratio, *(np.add.reduceat(a, edges) for a in self._by_context)))

    @property
    def _by_context(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return self.context_nats, self.context_sizes


def _ratio(nats: float, count: int) -> float:
    return float(nats) / math.log(2) / int(count) if count else math.nan


def check_strategy(config: ModelConfig, strategy: str, stride: int | None) -> int:
    """Checks a strategy and its stride.

    Args:
        config: the model.
        strategy: one of `STRATEGIES`.
        stride: S in bytes, a multiple of P from P to T, for those that slide; None is T / 2 rounded
            down to a multiple of P, at least P. The others take None alone.

    Returns:
        The stride; T where the windows do not overlap.

    Raises:
        UserError: strategy is unknown or the model's patch cannot be halved for it; stride does not
            fit.
    """
    P, T = config.patch_size, config.seq_len
    if strategy not in STRATEGIES:
        raise UserError(f"--strategy={strategy}: accepted is one of {', '.join(STRATEGIES)}")
    if "strided" in strategy and P % 2:
        raise UserError(
            f"--strategy={strategy}: accepted is basic or sliding, as the model's patch_size={P} "
            "is odd and cannot be halved"
        )
    if "sliding" not in strategy:
        if stride is not None:
            raise UserError(
                f"--stride={stride}: accepted is none with --strategy={strategy}; the strategies "
                "that have one are sliding and sliding_strided"
            )
        return T
    if stride is None:
        return max(T // 2 // P, 1) * P
    if stride not in range(P, T + 1, P):
        raise UserError(
            f"--stride={stride}: accepted is a multiple of the model's patch_size={P}, from {P} to "
            f"its seq_len={T}"
        )
    return int(stride)


def score(
    config: ModelConfig,
    params: functional.Params,
    corpus: Corpus,
    batch_size: int,
    limit: int = 0,
    strategy: str = "basic",
    stride: int | None = None,
) -> Iterator[tuple[EvalBatch, NDArray[np.float32]]]:
    """Scores documents.

    Args:
        config: the model.
        params: its parameters.
        corpus: the documents.
        batch_size: windows computed together, more if the mesh at hand does not divide them.
        limit: if not 0, only as many windows as score about this many bytes, taken evenly from the
            whole corpus.
        strategy: one of `STRATEGIES`, as the text above defines them.
        stride: see `check_strategy`.

    Yields:
        Batches and their negative log-likelihoods float32 [B, T] in nats, of which those that are
        not scored mean nothing.

    Raises:
        UserError: strategy or stride does not fit the model.
    """
    stride = check_strategy(config, strategy, stride)
    shift = config.patch_size // 2 if "strided" in strategy else 0
    table = eval_windows(corpus, config.seq_len, stride, shift)
    if limit and limit < corpus.num_bytes:
        count = max(1, math.ceil(len(table) * limit / corpus.num_bytes))
        table = table[np.linspace(0, len(table) - 1, count).astype(np.int64)]
    rows = sharding.axis_size("data") * sharding.axis_size("fsdp")
    batch_size = -(-max(1, min(batch_size, len(table))) // rows) * rows
    for batch in eval_batches(corpus, table, batch_size, config.seq_len, shift):
        yield batch, distributed.fetch(nll(config, params, _spread(batch.x)))


def _spread(x: NDArray[np.uint8]) -> jax.Array | NDArray[np.uint8]:
    """Lays a batch over the mesh at hand, if there is one."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return x
    place = sharding.batch_sharding(mesh)
    return distributed.put_batch(lambda first, count: x[first : first + count], x.shape, place)


def evaluate(
    config: ModelConfig,
    params: functional.Params,
    corpus: Corpus,
    batch_size: int,
    limit: int = 0,
    strategy: str = "basic",
    stride: int | None = None,
) -> Evaluation:
    """Evaluates a model on documents.

    Args:
        config: the model.
        params: its parameters.
        corpus: the documents.
        batch_size: windows computed together.
        limit: see `score`.
        strategy: see `score`.
        stride: see `check_strategy`.

    Raises:
        UserError: strategy or stride does not fit the model.
    """
    T = config.seq_len
    nats, sizes = np.zeros(len(corpus)), np.zeros(len(corpus), np.int64)
    context_nats, context_sizes = np.zeros(T), np.zeros(T, np.int64)
    start, first, model_bytes = math.nan, 0, 0
    total = min(limit or corpus.num_bytes, corpus.num_bytes)
    bar = tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)
    for batch, losses in score(config, params, corpus, batch_size, limit, strategy, stride):
        counts = batch.scored.sum(axis=1)
        bar.update(int(counts.sum()))
        if math.isnan(start):
            start, first = time.perf_counter(), int(counts.sum())
        masked = np.where(batch.scored, losses.astype(np.float64), 0.0)
        np.add.at(nats, batch.documents, masked.sum(axis=1))
        np.add.at(sizes, batch.documents, counts)
        context_nats += masked.sum(axis=0)
        context_sizes += batch.scored.sum(axis=0)
        model_bytes += int(batch.lengths.sum())
    bar.close()
    rest = int(sizes.sum()) - first
    return Evaluation(
        nats,
        sizes,
        context_nats,
        context_sizes,
        patch_size=config.patch_size,
        model_bytes=model_bytes,
        strategy=strategy,
        stride=check_strategy(config, strategy, stride),
        bytes_per_second=rest / (time.perf_counter() - start) if rest else math.nan,
    )


def _or_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(evaluation: Evaluation, *, words: int, modality: str, **protocol: Any) -> dict[str, Any]:
    """What an evaluation writes to JSON: its figures and the protocol they hold for.

    Args:
        evaluation: of whole documents.
        words: of the documents if they are text, else 0.
        modality: bytes, image or audio. Images have `bits_per_dim` too, the measure of the
            literature: as each dimension of a pixel is a byte, it equals bits per byte.
        **protocol: dataset, split, step and the like, as they are to appear.

    Returns:
        Field to value; None where there is no such figure, which JSON has and NaN it has not.
    """
    with np.errstate(over="ignore"):  # one "word" of a thousand bytes is enough
        perplexity = float(np.exp(evaluation.nats.sum() / words)) if words else math.nan
    bits_per_dim = {"bits_per_dim": evaluation.bits_per_byte} if modality == "image" else {}
    fields = {
        "bits_per_byte": evaluation.bits_per_byte,
        "bits_per_byte_stderr": evaluation.bits_per_byte_stderr,
        **bits_per_dim,
        "bytes": evaluation.bytes,
        "documents": len(evaluation.sizes),
        "words": words or math.nan,
        "word_perplexity": perplexity,
        "bytes_per_second": evaluation.bytes_per_second,
        "cost_factor": evaluation.cost_factor,
        "modality": modality,
        **protocol,
        "context": len(evaluation.context_nats),
        "strategy": evaluation.strategy,
        "stride": evaluation.stride,
        "bits_per_byte_by_position": evaluation.bits_per_byte_by_position,
        "context_bin": evaluation.context_bin,
        "bits_per_byte_by_context": evaluation.bits_per_byte_by_context,
    }
    return {name: _or_none(value) for name, value in fields.items()}
