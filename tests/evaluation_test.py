import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from megabyte_jax import evaluation
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import open_corpus
from megabyte_jax.errors import UserError
from megabyte_jax.models import functional
from megabyte_jax.text import count_words
from tests import runs

P, T = runs.P, runs.T
MODEL = runs.tiny_model(init="scaled")
RANDOM = np.random.default_rng(0)
SIZES = [0, 1, P - 1, P, P + 1, T - 1, T, T + 1, *RANDOM.integers(0, 4 * T, 30).tolist()]
DOCUMENTS = [RANDOM.bytes(size) for size in SIZES]


@pytest.fixture(scope="module")
def params():
    return functional.init_params(MODEL, jax.random.key(0))


def places(n, strategy, stride):
    """Of each byte of a document of n: where its window begins and where in it the byte stands."""
    for t in range(n):
        start = 0
        while t >= start + T:  # the first window that holds it
            start += stride
        if "strided" in strategy and t - start >= P and (t - start) % P >= P // 2:
            start += P // 2
        yield start, t - start


def brute_force(params, documents, strategy="basic", stride=T):
    """Nats of every byte of documents, from the logits after exactly the bytes before it.

    Also the position of each in its window.
    """
    x, positions = np.zeros((2048, T), np.uint8), []  # one shape to compile
    for document in documents:
        for start, position in places(len(document), strategy, stride):
            x[len(positions), :position] = [*document[start : start + position]]
            positions.append(position)
    logits = np.concatenate([evaluation_logits(params, part) for part in x.reshape(8, -1, T)])
    n = np.arange(len(positions))
    logits = logits[n, positions].astype(np.float64)
    of_byte = logits[n, np.frombuffer(b"".join(documents), np.uint8)]
    return np.log(np.exp(logits).sum(-1)) - of_byte, np.array(positions)


def evaluation_logits(params, x):
    return jax.jit(functional.logits, static_argnums=0)(MODEL, params, x)


def test_the_bytes_counted_are_those_of_the_files(params, tmp_path):
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i:02}").write_bytes(document)
    # Empty files are bad records; as parts of other corpora empty documents are none.
    corpus = open_corpus(str(tmp_path), bad=BadRecords(SIZES.count(0)))
    result = evaluation.evaluate(MODEL, params, corpus, 8)
    assert result.sizes.tolist() == [size for size in SIZES if size]
    assert result.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_uniform_model_has_exactly_8_bits_per_byte(params):
    uniform = {**params, "byte_embedding": np.zeros_like(params["byte_embedding"])}
    result = evaluation.evaluate(MODEL, uniform, runs.corpus_of(*DOCUMENTS), 8)
    # log 256 in float32 is off by 1e-8 of it.
    np.testing.assert_allclose(result.bits_per_byte, 8, rtol=3e-8)
    np.testing.assert_allclose(result.bits_per_byte_by_position, 8, rtol=3e-8)
    assert result.bits_per_byte_stderr < 1e-6


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_document_scores_as_it_does_alone(params, batch_size):
    result = evaluation.evaluate(MODEL, params, runs.corpus_of(*DOCUMENTS), batch_size)
    nats = np.split(brute_force(params, DOCUMENTS)[0], np.cumsum(SIZES)[:-1])
    expected = [document.sum() for document in nats]
    np.testing.assert_allclose(result.nats, expected, rtol=1e-6)
    total = sum(expected) / math.log(2) / sum(SIZES)
    np.testing.assert_allclose(result.bits_per_byte, total, rtol=1e-6)


CASES = [("basic", None, T), ("strided", None, T)]
CASES += [(s, S, S or T // 2) for s in ("sliding", "sliding_strided") for S in (None, P, 2 * P, T)]
EDGES = [0, 1, P - 1, P, P + 1, P + 2, P + 3, T - 1, T, T + 1, T + P + 3, 2 * T, 3 * T + 5]


@pytest.mark.parametrize("strategy, given, stride", CASES)
def test_every_byte_scores_as_its_definition_says(params, strategy, given, stride):
    documents = [RANDOM.bytes(size) for size in EDGES]
    made = [np.full(size, np.nan) for size in EDGES]
    corpus = runs.corpus_of(*documents)
    for batch, losses in evaluation.score(MODEL, params, corpus, 7, 0, strategy, given):
        for row, position in zip(*np.nonzero(batch.scored), strict=True):
            document, t = batch.documents[row], batch.starts[row] + position
            assert np.isnan(made[document][t])
            made[document][t] = losses[row, position]
    expected, _ = brute_force(params, documents, strategy, stride)
    np.testing.assert_allclose(np.concatenate(made), expected, rtol=1e-5)


@pytest.mark.parametrize("strategy, given, stride", CASES)
def test_losses_by_position_are_means_that_add_up(params, strategy, given, stride):
    result = evaluation.evaluate(MODEL, params, runs.corpus_of(*DOCUMENTS), 8, 0, strategy, given)
    nats, positions = brute_force(params, DOCUMENTS, strategy, stride)
    assert result.context_sizes.tolist() == np.bincount(positions, minlength=T).tolist()
    bits = nats / math.log(2)
    by_position = [bits[positions % P == p].mean() for p in range(P)]
    by_context = [bits[positions == t].mean() for t in np.unique(positions)]
    np.testing.assert_allclose(result.bits_per_byte_by_position, by_position, rtol=1e-6)
    context = np.array(result.bits_per_byte_by_context)
    assert len(context) == T and result.context_bin == 1
    assert np.flatnonzero(~np.isnan(context)).tolist() == np.unique(positions).tolist()
    np.testing.assert_allclose(context[~np.isnan(context)], by_context, rtol=1e-6)
    np.testing.assert_allclose(result.bits_per_byte, bits.mean(), rtol=1e-6)
    weighted = np.nansum(context * result.context_sizes) / result.context_sizes.sum()
    np.testing.assert_allclose(weighted, result.bits_per_byte, rtol=1e-12)


@pytest.mark.parametrize(
    "strategy, stride, computed",
    [
        ("basic", None, 3 * T + 5),
        ("sliding", None, 5 * T + 17),  # at 0, 12, 24, 36, 48 and 60
        ("sliding", P, 14 * T + 21),  # at 0, 4, ..., 56
        ("strided", None, 3 * T + 5 + 3 * T),  # no byte of a shifted window at 74 would be scored
        ("sliding_strided", None, 5 * T + 17 + 5 * T + 15),
    ],
)
def test_the_cost_factor_is_bytes_computed_over_bytes_scored(params, strategy, stride, computed):
    corpus = runs.corpus_of(bytes(3 * T + 5), b"")
    result = evaluation.evaluate(MODEL, params, corpus, 4, 0, strategy, stride)
    assert result.bytes == 3 * T + 5
    assert result.cost_factor == computed / (3 * T + 5)


@pytest.mark.parametrize("length, size", [(1, 1), (1024, 1), (1025, 2), (3000, 3), (8192, 8)])
def test_losses_by_context_are_binned_to_at_most_1024(length, size):
    nats, counts = RANDOM.uniform(0, 9, length), RANDOM.integers(1, 5, length)
    result = of_documents(nats[:2], counts[:2], nats, counts)
    assert result.context_bin == size
    parts = [slice(start, start + size) for start in range(0, length, size)]
    expected = [nats[part].sum() / counts[part].sum() / math.log(2) for part in parts]
    assert len(expected) <= 1024
    np.testing.assert_allclose(result.bits_per_byte_by_context, expected)


def with_patches(patch_size, dim=16):
    transformer = dataclasses.replace(MODEL.global_model, dim=dim)
    return dataclasses.replace(MODEL, patch_size=patch_size, global_model=transformer)


@pytest.mark.parametrize(
    "strategy, stride, message",
    [
        ("slide", None, "--strategy=slide: accepted is one of basic, sliding, strided, sliding_"),
        ("", None, "--strategy=: accepted is one of basic, sliding, strided, sliding_strided"),
        ("basic", T, "--stride=24: accepted is none with --strategy=basic; .*sliding_strided"),
        ("strided", 8, "--stride=8: accepted is none with --strategy=strided; .*sliding_strided"),
        *(
            (strategy, S, f"--stride={S}: .* multiple of .*=4, from 4 to its seq_len=24$")
            for strategy in ("sliding", "sliding_strided")
            for S in (0, -4, 1, 7, 26, 28)
        ),
    ],
)
def test_a_strategy_or_stride_that_does_not_fit_is_refused(params, strategy, stride, message):
    with pytest.raises(UserError, match=f"^{message}"):
        evaluation.evaluate(MODEL, params, runs.corpus_of(b""), 8, 0, strategy, stride)


@pytest.mark.parametrize("P, dim", [(3, 18), (1, 16)])
def test_a_patch_that_cannot_be_halved_is_refused(P, dim):
    model = with_patches(P, dim)
    for strategy in ("strided", "sliding_strided"):
        with pytest.raises(UserError, match=f"{strategy}: .* sliding, as .* patch_size={P} is odd"):
            evaluation.check_strategy(model, strategy, None)
    assert evaluation.check_strategy(model, "sliding", None) == 12
    assert evaluation.check_strategy(model, "sliding", 2 * P) == 2 * P


@pytest.mark.parametrize("patch_size, stride", [(2, 12), (4, 12), (8, 8), (24, 24)])
def test_the_stride_is_half_the_context_in_whole_patches(patch_size, stride):
    model = with_patches(patch_size, dim=48)
    assert evaluation.check_strategy(model, "sliding_strided", None) == stride


def of_documents(nats, sizes, context_nats=None, context_sizes=None):
    none = np.zeros(T), np.zeros(T, np.int64)
    by_context = none if context_nats is None else (context_nats, context_sizes)
    return evaluation.Evaluation(nats, sizes, *by_context, 1, 0, "basic", T, 1.0)


def test_the_standard_error_is_that_of_a_ratio_over_documents():
    nats, sizes = RANDOM.uniform(0, 9, 7) + np.arange(7), np.arange(7) * 3 + 2
    result = of_documents(nats, sizes)
    bits, n = nats / np.log(2), 7  # Cochran, Sampling Techniques, (2.39) without finite correction
    ratio, mean_size = bits.sum() / sizes.sum(), sizes.sum() / n
    squares = sum((bits[i] - ratio * sizes[i]) ** 2 for i in range(n))
    expected = math.sqrt(squares / (n - 1) / n) / mean_size
    np.testing.assert_allclose(result.bits_per_byte_stderr, expected)


def test_the_standard_error_is_near_the_spread_of_repeated_samples():
    population = RANDOM.gamma(2, 50, 4000).astype(np.int64) + 1
    nats = population * RANDOM.normal(1.4, 0.3, 4000)
    draws = []
    for _ in range(500):
        i = RANDOM.integers(0, 4000, 50)
        result = of_documents(nats[i], population[i])
        draws.append((result.bits_per_byte, result.bits_per_byte_stderr))
    spread, error = np.std([d[0] for d in draws]), np.mean([d[1] for d in draws])
    assert abs(error / spread - 1) < 0.12


@pytest.mark.parametrize("limit", [1, 100, 400, 10**9])
def test_a_limit_scores_at_least_as_many_bytes_spread_over_the_documents(params, limit):
    corpus = runs.corpus_of(*(RANDOM.bytes(T) for _ in range(40)))
    result = evaluation.evaluate(MODEL, params, corpus, 8, limit)
    assert result.bytes == min(-(-limit // T), 40) * T
    if limit == 400:
        scored = np.flatnonzero(result.sizes)
        assert scored[0] == 0 and scored[-1] == 39 and np.diff(scored).max() < 4


@pytest.mark.parametrize("strategy", evaluation.STRATEGIES)
def test_a_limit_holds_for_every_strategy(params, strategy):
    corpus = runs.corpus_of(*(RANDOM.bytes(4 * T) for _ in range(40)))
    result = evaluation.evaluate(MODEL, params, corpus, 8, 960, strategy)
    assert 0.9 * 960 < result.bytes < 1.1 * 960
    assert (result.sizes > 0).sum() > 20


def test_word_perplexity_is_two_to_the_bits_per_word(params):
    corpus = runs.corpus_of(b"one two  three", b"", "\n\tété\u00a0fin ".encode())
    result = evaluation.evaluate(MODEL, params, corpus, 8)
    words = count_words(corpus)
    assert words == 4
    made = evaluation.report(result, words=words, modality="bytes")["word_perplexity"]
    bits = result.bits_per_byte * result.bytes
    np.testing.assert_allclose(made, 2 ** (bits / words), rtol=1e-9)


@pytest.mark.parametrize("documents", [[b""], [b"a"], [b"x" * 5000], [b"a", b"b"]])
def test_no_report_holds_what_json_has_not(params, documents):
    corpus = runs.corpus_of(*documents)
    result = evaluation.evaluate(MODEL, params, corpus, 8)
    made = evaluation.report(result, words=count_words(corpus), modality="image", split="test")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert (made["bits_per_byte"] is None) == (result.bytes == 0)
    assert made["strategy"] == "basic" and made["stride"] == made["context"] == T
    assert made["bits_per_dim"] == made["bits_per_byte"] and made["modality"] == "image"
