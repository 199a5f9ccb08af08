import math

import numpy as np
import pytest

import megabyte_jax
from megabyte_jax.errors import UserError
from tests import runs

T = runs.T
BYTES = np.random.default_rng(0).integers(0, 256, (3, T), np.uint8)


@pytest.fixture(scope="module")
def model(finished_run):
    return megabyte_jax.load(finished_run)


def test_a_run_is_loaded_from_its_directory_alone(model, finished_run):
    assert model.config == runs.tiny_model(dropout=0.1) and model.step == 6
    older = megabyte_jax.load(str(finished_run), step=4)
    assert older.step == 4
    assert (older.logits(BYTES) != model.logits(BYTES)).any()


def test_logits_predict_every_byte_from_those_before_it(model):
    whole = model.logits(BYTES)
    assert whole.shape == (3, T, 256) and whole.dtype == np.float32
    for length in (1, 3, 4, 5, T - 1):
        part = model.logits(BYTES[:, :length])
        assert part.shape == (3, length, 256)
        np.testing.assert_allclose(part, whole[:, :length], atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_logits_of_nothing_are_empty(model, shape):
    assert model.logits(np.zeros(shape, np.uint8)).shape == (*shape, 256)


@pytest.mark.parametrize(
    "x", [np.zeros((1, T + 1), "u1"), np.zeros((1, 4), int), np.zeros(4, "u1")]
)
def test_logits_of_anything_else_are_refused(model, x):
    with pytest.raises(UserError, match=r"x=u?int.*: accepted is uint8 \[B, T\]"):
        model.logits(x)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, T - 1, T, T + 1, 9 * T + 2])
def test_the_log_likelihood_is_that_of_windows_from_the_start(model, size):
    data = np.random.default_rng(size).bytes(size)
    made = model.log_likelihood(data)
    assert made.shape == (size,) and made.dtype == np.float32
    expected = []
    for start in range(0, size, T):
        window = np.frombuffer(data[start : start + T], np.uint8)
        logits = model.logits(window[None])[0].astype(np.float64)
        normaliser = np.log(np.exp(logits).sum(-1))
        expected += (logits[np.arange(len(window)), window] - normaliser).tolist()
    np.testing.assert_allclose(made, np.array(expected), atol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 5, 7, T, T + 7, 3 * T + 5])
@pytest.mark.parametrize("strategy", ["strided", "sliding", "sliding_strided"])
def test_the_log_likelihood_is_that_of_the_windows_of_the_strategy(model, strategy, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    given, half = (8 if "sliding" in strategy else None), runs.P // 2
    shifts = (0, half) if "strided" in strategy else (0,)
    expected, done, start = np.zeros(size), 0, 0
    while done < size:
        new = np.arange(done, min(start + T, size))
        for shift in shifts:
            window = data[start + shift : start + shift + T]
            logits = model.logits(window[None])[0].astype(np.float64)
            at = new - start - shift
            at = at[(at >= runs.P) & (at % runs.P < half)] if shift else at
            of_byte = logits[at, window[at]] - np.log(np.exp(logits[at]).sum(-1))
            expected[start + shift + at] = of_byte  # the shifted window comes second and prevails
        done, start = start + T, start + (given or T)
    made = model.log_likelihood(data.tobytes(), strategy, given)
    assert made.shape == (size,) and made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("data", [b"", b"ab"])
@pytest.mark.parametrize(
    "arguments, option",
    [
        ({"strategy": "slide"}, "--strategy=slide"),
        ({"stride": 4}, "--stride=4"),
        ({"strategy": "sliding", "stride": 6}, "--stride=6"),
    ],
)
def test_other_strategies_are_refused(model, data, arguments, option):
    with pytest.raises(UserError, match=f"{option}: accepted is"):
        model.log_likelihood(data, **arguments)


def test_the_model_has_learned_something(model, text_dir):
    data = (text_dir / "13.txt").read_bytes()
    assert -model.log_likelihood(data).mean() / math.log(2) < 7.9


@pytest.mark.parametrize("name", ["file", "nowhere", "empty"])
def test_what_is_no_run_is_named(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--workdir=.*{name}: .*; accepted is the directory"):
        megabyte_jax.load(tmp_path / name)


def test_every_exported_name_is_there_and_no_other():
    for name in megabyte_jax.__all__:
        assert getattr(megabyte_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megabyte_jax.nothing
