import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax import evaluation
from megabyte_jax.data.corpus import open_corpus
from megabyte_jax.models import megabyte
from tests import runs

P, T = runs.P, runs.T
MODEL = runs.tiny_model(init="scaled")
RANDOM = np.random.default_rng(0)
SIZES = [0, 1, P - 1, P, P + 1, T - 1, T, T + 1, *RANDOM.integers(0, 4 * T, 30).tolist()]
DOCUMENTS = [RANDOM.bytes(size) for size in SIZES]


@pytest.fixture(scope="module")
def params():
    return megabyte.init_params(MODEL, jax.random.key(0))


def alone(params, document):
    """Nats of every byte of a document, from the logits of its windows one by one."""
    nats = []
    for start in range(0, len(document), T):
        window = np.frombuffer(document[start : start + T].ljust(T, b"\0"), np.uint8)
        logits = np.asarray(evaluation_logits(params, window[None])[0], np.float64)
        of_byte = logits[np.arange(T), window] - np.log(np.exp(logits).sum(-1))
        nats += (-of_byte[: len(document) - start]).tolist()
    return np.array(nats)


def evaluation_logits(params, x):
    return jax.jit(megabyte.logits, static_argnums=0)(MODEL, params, x)


def test_the_bytes_counted_are_those_of_the_files(params, tmp_path):
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i:02}").write_bytes(document)
    result = evaluation.evaluate(MODEL, params, open_corpus(str(tmp_path)), 8)
    assert result.sizes.tolist() == SIZES
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
    expected = [alone(params, document).sum() for document in DOCUMENTS]
    np.testing.assert_allclose(result.nats, expected, rtol=1e-6)
    total = sum(expected) / math.log(2) / sum(SIZES)
    np.testing.assert_allclose(result.bits_per_byte, total, rtol=1e-6)


def test_losses_by_position_in_the_patch_add_up(params):
    result = evaluation.evaluate(MODEL, params, runs.corpus_of(*DOCUMENTS), 8)
    nats = [alone(params, document) for document in DOCUMENTS]
    for p in range(P):
        at = np.concatenate([document[p::P] for document in nats])  # T is a multiple of P
        assert result.position_sizes[p] == len(at)
        bits = result.bits_per_byte_by_position[p]
        np.testing.assert_allclose(bits, at.mean() / math.log(2), rtol=1e-6)
    np.testing.assert_allclose(result.position_nats.sum(), result.nats.sum(), rtol=1e-12)


def test_the_standard_error_is_that_of_a_ratio_over_documents():
    nats, sizes = RANDOM.uniform(0, 9, 7) + np.arange(7), np.arange(7) * 3 + 2
    result = evaluation.Evaluation(nats, sizes, nats[:P], sizes[:P], 1.0)
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
        result = evaluation.Evaluation(nats[i], population[i], nats[:1], population[:1], 1.0)
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


def test_word_perplexity_is_two_to_the_bits_per_word(params):
    corpus = runs.corpus_of(b"one two  three", b"", "\n\tété\u00a0fin ".encode())
    result = evaluation.evaluate(MODEL, params, corpus, 8)
    words = evaluation.count_words(corpus)
    assert words == 4
    made = evaluation.report(result, words=words, context=T)["word_perplexity"]
    bits = result.bits_per_byte * result.bytes
    np.testing.assert_allclose(made, 2 ** (bits / words), rtol=1e-9)


@pytest.mark.parametrize("document", [b"\xff\xfe a", b"a\0b", b"\xc3a"])
def test_what_is_not_text_has_no_words(document):
    assert evaluation.count_words(runs.corpus_of(b"some text", document)) == 0


@given(st.text(st.characters(exclude_characters="\0")), st.integers(1, 9), st.integers(0, 3))
def test_words_are_counted_the_same_in_pieces_and_in_cut_text(text, piece_size, cut):
    whole = f"é{text}é".encode()  # a cut leaves part of a letter at either end
    data = whole[cut // 2 : len(whole) - cut % 2]
    made = evaluation._count_words(np.frombuffer(data, np.uint8), piece_size)
    assert made == len(data.split())


@pytest.mark.parametrize("documents", [[b""], [b"a"], [b"x" * 5000], [b"a", b"b"]])
def test_no_report_holds_what_json_has_not(params, documents):
    corpus = runs.corpus_of(*documents)
    result = evaluation.evaluate(MODEL, params, corpus, 8)
    made = evaluation.report(result, words=evaluation.count_words(corpus), context=T, split="test")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert (made["bits_per_byte"] is None) == (result.bytes == 0)
    assert made["strategy"] == "basic" and made["stride"] == made["context"] == T
