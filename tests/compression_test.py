import math
import runpy
import subprocess
import sys
import zlib

import constriction
import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

import megabyte_jax
from megabyte_jax import TrainedModel, compression
from megabyte_jax.errors import NonFiniteError, UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig, TransformerConfig
from tests import runs

P, T = runs.P, runs.T


def made(config, seed=0, scale=1.0):
    """A model of random parameters; more of `scale` makes it surer of itself."""
    params = functional.init_params(config, jax.random.key(seed))
    params["byte_embedding"] = params["byte_embedding"] * scale
    return TrainedModel(config, params, 0)


def baseline():
    stack = TransformerConfig(dim=8, num_layers=1, num_heads=2)
    return ByteTransformerConfig(seq_len=10, transformer=stack, dtype="float32")


MODELS = {
    "plain": made(runs.tiny_model()),
    "sure": made(runs.tiny_model(init="scaled"), scale=8.0),
    "very_sure": made(runs.tiny_model(init="scaled"), scale=60.0),
    "baseline": made(baseline(), scale=20.0),
}
FILES = {
    "NULs": lambda n: bytes(n),
    "random": lambda n: np.random.default_rng(n).bytes(n),
    "skewed": lambda n: bytes(np.random.default_rng(n).geometric(0.4, n).astype(np.uint8)),
    "text": lambda n: (b"The quick brown fox jumps over the lazy dog.\n" * n)[:n],
}


def bits(model, data):
    return -model.log_likelihood(data).astype(np.float64) / math.log(2)


def check(model, data):
    stream = compression.compress(model, data)
    assert compression.decompress(model, stream) == data
    expected = bits(model, data).sum() / 8
    assert abs(len(stream) - expected) <= 0.001 * expected + 64


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", FILES)
def test_files_come_back_and_take_what_the_model_says(name, kind):
    for size in (0, 1, P - 1, P, P + 1, T - 1, T, T + 1, 7 * T - 2):
        check(MODELS[name], FILES[kind](size))


@pytest.mark.parametrize("name", MODELS)
def test_files_of_several_batches_come_back_and_take_what_the_model_says(name):
    check(MODELS[name], FILES["random"](64 * T + 5) + FILES["text"](64 * T))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=3 * T + 1), st.sampled_from(sorted(MODELS)))
def test_any_bytes_come_back_and_take_what_the_model_says(data, name):
    check(MODELS[name], data)


def test_bytes_that_the_model_thinks_impossible_cost_what_it_says():
    model = MODELS["very_sure"]
    data = FILES["random"](500)
    assert bits(model, data).max() > 200
    check(model, data)
    unlikeliest = b""
    for _ in range(P):  # one byte repeated, so that rounding its frequency cannot even out
        row = np.frombuffer(unlikeliest.ljust(P, b"\0"), np.uint8)[None]
        unlikeliest += bytes([model.logits(row)[0, len(unlikeliest)].argmin()])
    assert bits(model, unlikeliest).min() > 40
    check(model, unlikeliest * 50)


def test_a_byte_of_no_probability_comes_back():
    data = FILES["random"](50)
    impossible = made(runs.tiny_model(init="scaled"), scale=1e6)
    assert bits(impossible, data).max() > 2000
    stream = compression.compress(impossible, data)
    assert compression.decompress(impossible, stream) == data and len(stream) < 50 * 150


@pytest.mark.parametrize("room, rows", [(0.1, 1), (1, 1), (3.9, 2), (4, 4), (1000, 64)])
def test_rows_are_as_many_as_there_is_room_for_their_caches(monkeypatch, room, rows):
    model, data = MODELS["plain"], FILES["skewed"](5 * T + 3)
    one = sum(x.nbytes for x in jax.tree.leaves(functional.init_cache(model.config, 1)))
    monkeypatch.setattr(compression, "_MAX_CACHE_BYTES", int(room * one))
    assert compression._max_rows(model.config) == rows
    check(model, data)


def test_the_range_coder_takes_integers_as_they_are():
    # Its state after one symbol tells the frequency of that and of all before it.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p = rng.dirichlet(np.full(256, 10.0 ** -rng.integers(4)))[None]
        table = compression._frequencies(p, p >= 2**-16)[0]
        assert table.sum() == 2**24 and table.min() >= 1 and (table % 1 == 0).all()
        for symbol in (0, int(rng.integers(258)), 257):
            encoder = constriction.stream.queue.RangeEncoder()
            model = constriction.stream.model.Categorical(perfect=False)
            encoder.encode(np.array([symbol], np.int32), model, (table - 1)[None])
            unit = 2**40 - 1  # of a range of 2**64 - 1
            low, size = int(table[:symbol].sum()) * unit, int(table[symbol]) * unit
            if size < 2**32:
                low, size = (low << 32) % 2**64, size << 32
            assert encoder.pos()[1] == (low, size)


DATA = b"a few bytes of it"


@pytest.fixture(scope="module")
def stream():
    return compression.compress(MODELS["plain"], DATA)


def refused(stream, message, model=MODELS["plain"]):
    with pytest.raises(UserError, match=message) as error:
        compression.decompress(model, stream)
    assert "accepted is" in str(error.value) and "\n" not in str(error.value)


def test_a_stream_cut_short_or_with_more_behind_it_is_refused(stream):
    for size in range(len(stream)):
        refused(stream[:size], "cut short" if size >= 4 else "no compressed stream")
    for more in (b"\0", b"\0" * 4, stream):
        refused(stream + more, "damaged or cut short")


def test_every_flipped_bit_is_noticed(stream):
    for bit in range(8 * len(stream)):
        flipped = bytearray(stream)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped), "no compressed stream" if bit < 32 else "damaged")


@given(st.binary(max_size=100))
def test_foreign_bytes_are_refused(data):
    refused(data, "no compressed stream|damaged or cut short")
    refused(b"MBC\x01" + data, "damaged or cut short")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_words_that_decode_to_other_bytes_are_never_returned(stream, index, change):
    # As if the model predicted otherwise here: the stream is whole, but the bytes are others.
    body = bytearray(stream[:-4])
    body[32 + index % (len(body) - 32)] ^= change
    changed = bytes(body) + zlib.crc32(body).to_bytes(4, "little")
    try:  # the last few bits of the last word may be anything
        assert compression.decompress(MODELS["plain"], changed) == DATA
    except UserError as error:
        assert "does not decode to the bytes" in str(error)


def crafted(stream, size, words=b""):
    """A whole stream, by its checksum, that says another size; words come after its own."""
    body = stream[:20] + size.to_bytes(8, "little") + stream[28:-4] + words
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("size", [2**64 - 1, 2**50, 2**34, 0])
def test_a_size_that_does_not_fit_is_refused_before_anything_is_decoded(stream, size):
    refused(crafted(stream, size), "damaged: its size does not fit; accepted is a stream")


def test_words_after_the_last_are_refused(stream):
    refused(crafted(stream, len(DATA), b"\x80" * 8), "does not decode to the bytes")


def test_other_predictions_are_noticed(stream, monkeypatch):
    step = compression._code_step
    monkeypatch.setattr(
        compression, "_code_step", lambda logits, *rest: step(logits[:, ::-1], *rest)
    )
    refused(stream, "does not decode to the bytes")


def test_another_checkpoint_is_refused(stream):
    other = made(runs.tiny_model(), seed=1)
    refused(stream, MODELS["plain"].digest[:32] + ".*" + other.digest[:32], other)


def test_the_digest_is_of_the_config_and_of_every_parameter():
    model = made(runs.tiny_model())
    again = made(runs.tiny_model())
    assert model.digest == again.digest == MODELS["plain"].digest
    assert len(bytes.fromhex(model.digest)) == 32
    leaves, structure = jax.tree.flatten(model.params)
    others = {TrainedModel(runs.tiny_model(dropout=0.1), model.params, 0).digest}
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf.at[(0,) * leaf.ndim].add(1.0), *leaves[i + 1 :]]
        params = jax.tree.unflatten(structure, changed)
        others.add(TrainedModel(model.config, params, 0).digest)
    assert len(others - {model.digest}) == len(leaves) + 1


def test_predictions_that_are_no_numbers_stop_it():
    with pytest.raises(NonFiniteError, match="not finite"):
        compression.compress(made(runs.tiny_model(), scale=math.nan), b"abc")


def command(monkeypatch, *arguments):
    """Runs the command line in this process; its exit status."""
    for name in set(flags.FLAGS) - runs.FLAGS_OF_LIBRARIES:
        delattr(flags.FLAGS, name)
    monkeypatch.setattr(sys, "argv", ["compression.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(compression.__file__, run_name="__main__")
    return exit.value.code or 0


@pytest.mark.parametrize("data", [b"", bytes(100), b"some text, " * 9], ids=["empty", "0", "text"])
def test_the_command_line_goes_both_ways(finished_run, tmp_path, monkeypatch, capfd, data):
    (tmp_path / "in").write_bytes(data)
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "link").symlink_to("out")
    run = f"--workdir={finished_run}"
    assert command(monkeypatch, "encode", run, tmp_path / "in", tmp_path / "packed") == 0
    packed = (tmp_path / "packed").read_bytes()
    assert packed == compression.compress(megabyte_jax.load(finished_run), data)
    out = capfd.readouterr().out
    assert out.startswith(f"{len(data):,} bytes, compressed {len(packed):,}")
    assert not data or f" {8 * len(packed) / len(data):.4f} bits per byte, ratio" in out
    assert command(monkeypatch, run, "decode", tmp_path / "packed", tmp_path / "link") == 0
    assert capfd.readouterr().out == out
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out").read_bytes() == data
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "link", "packed"}


def test_another_process_decodes_the_same_bytes(finished_run, tmp_path):
    data = FILES["random"](3 * T + 1)
    stream = compression.compress(megabyte_jax.load(finished_run), data)
    (tmp_path / "packed").write_bytes(stream)
    code = [sys.executable, "-m", "megabyte_jax.compression", "decode"]
    arguments = [f"--workdir={finished_run}", tmp_path / "packed", tmp_path / "out"]
    done = subprocess.run([*code, *arguments], cwd=runs.ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.count(b"\n") == 1
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["encode"], "arguments 'encode': accepted is encode|decode IN OUT, and flags"),
        ([], "arguments 'none'"),
        (["encode", "in", "out", "more"], "arguments 'encode in out more': accepted is"),
        (["squeeze", "in", "out"], "'squeeze': accepted is encode or decode"),
        (["encode", "no", "out"], "IN=no: No such file or directory; accepted is a readable"),
        (["encode", ".", "out"], "IN=.: Is a directory; accepted is a readable file"),
        (["encode", "in", "in"], "OUT=in: accepted is another file than IN"),
        (["encode", "in", "./in"], "OUT=./in: accepted is another file than IN"),
        (["encode", "in", "link"], "OUT=link: accepted is another file than IN"),
        (["encode", "in", "."], "OUT=.: accepted is a file that can be written"),
        (["encode", "in", "/dev/null"], "OUT=/dev/null: accepted is a file that can be written"),
        (["encode", "in", "in/out"], "OUT=in/out: accepted is a file that can be written"),
        (["encode", "in", "x" * 999], "xxx: accepted is a file that can be written"),
        (["decode", "in", "out"], "IN=in: no compressed stream, or one of another version"),
        (["decode", "empty", "out"], "IN=empty: no compressed stream"),
        (["decode", "cut", "out"], "IN=cut: damaged or cut short; accepted is a whole stream"),
        (["decode", "foreign", "out"], "IN=foreign: made with the checkpoint of digest"),
        (["encode", "in", "out", "--workdir=untrained"], "--workdir=untrained: "),
        (["encode", "in", "out", "--workdir=nowhere"], "--workdir=nowhere: "),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    finished_run, tmp_path, monkeypatch, capfd, arguments, named
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(b"some bytes")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "empty").write_bytes(b"")
    foreign = compression.compress(MODELS["plain"], b"abc")
    (tmp_path / "foreign").write_bytes(foreign)
    own = compression.compress(megabyte_jax.load(finished_run), b"abc")
    (tmp_path / "cut").write_bytes(own[:-1])
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.json").write_bytes(
        (finished_run / "config.json").read_bytes()
    )
    before = runs.contents(tmp_path)
    assert command(monkeypatch, f"--workdir={finished_run}", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("compression.py: error: ") and err.count("\n") == 1
    assert named in err and "accepted is" in err
    assert runs.contents(tmp_path) == before


def test_a_failed_write_is_one_line_and_leaves_the_old_file(
    finished_run, tmp_path, monkeypatch, capfd
):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "in").write_bytes(b"abc")
    (tmp_path / "out").write_bytes(b"old")
    monkeypatch.setattr("os.replace", full)
    before = runs.contents(tmp_path)
    run = f"--workdir={finished_run}"
    assert command(monkeypatch, "encode", run, tmp_path / "in", tmp_path / "out") == 2
    assert f"OUT={tmp_path}/out: No space left on device" in capfd.readouterr().err
    assert runs.contents(tmp_path) == before


def test_help_is_shown_without_waiting_for_jax():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['compression.py', '--help']\n"
        "try: runpy.run_module('megabyte_jax.compression', run_name='__main__', alter_sys=True)\n"
        "except SystemExit: print(sorted({'jax', 'flax', 'orbax', 'optax'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True)
    assert done.stdout.endswith(b"[]\n"), done.stderr
    assert b"--workdir" in done.stdout and b"encode --workdir=DIR IN OUT" in done.stdout
