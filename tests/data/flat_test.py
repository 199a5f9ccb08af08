import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.flat import flatten
from megabyte_jax.errors import DataError, UserError

DOCUMENTS = [b"one", b"\0\xff", b"three"]


def write(cache_dir: Path, documents=DOCUMENTS, key=None, limit=0):
    return flatten(str(cache_dir), "my set", key or {"k": 1}, iter(documents), BadRecords(limit))


def never():
    raise AssertionError("read again")
    yield b""


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=20))
def test_documents_come_back_as_they_were(documents):
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), documents)
        assert [document.data.tobytes() for document in corpus] == documents
        assert corpus.offsets.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
        assert (len(corpus), corpus.num_bytes) == (len(documents), len(b"".join(documents)))
        assert corpus.documents[-1].data.tobytes() == documents[-1]
        assert [len(document) for document in corpus.documents[1:3]] == [*map(len, documents[1:3])]
        with pytest.raises(IndexError):
            corpus.documents[len(documents)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=20), st.data())
def test_any_part_of_the_whole_can_be_read(documents, data):
    whole = b"".join(documents)
    start = data.draw(st.integers(0, len(whole) - 1))
    out = np.zeros(data.draw(st.integers(0, len(whole) - start)), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), documents)
        for read in (corpus.read, Corpus("c", tuple(corpus)).read):
            out[:] = 0
            read(start, out)
            assert out.tobytes() == whole[start : start + len(out)]


def test_the_second_time_nothing_is_read_and_bad_records_count_again(tmp_path):
    def contents(bad):
        yield b"fine"
        bad.add("x: broken")

    first = BadRecords(1)
    flatten(str(tmp_path), "s", {}, contents(first), first)
    again = BadRecords(1)
    corpus = flatten(str(tmp_path), "s", {}, never(), again)
    assert (corpus.name, corpus.bad_records) == ("s", 1)
    assert (again.count, again.first) == (first.count, first.first) == (1, "x: broken")
    with pytest.raises(DataError, match="x: broken; a larger data.max_bad_records=0"):
        flatten(str(tmp_path), "s", {}, never(), BadRecords(0))


def test_another_key_is_another_layout(tmp_path):
    write(tmp_path, [b"a"], {"scan": "patch"})
    other = write(tmp_path, [b"b"], {"scan": "raster"})
    assert other.documents[0].data.tobytes() == b"b" and len(os.listdir(tmp_path)) == 2


def test_the_manifest_says_what_it_was_made_from(tmp_path):
    corpus = write(tmp_path, key={"files": "abc"})
    offsets = Path(corpus.documents.source).with_name("offsets.npy").read_bytes()
    assert corpus.manifest == {
        "key": {"files": "abc"},
        "documents": 3,
        "bytes": 10,
        "bad_records": 0,
        "first_bad_record": None,
        "sha256": {
            "data.bin": hashlib.sha256(b"".join(DOCUMENTS)).hexdigest(),
            "offsets.npy": hashlib.sha256(offsets).hexdigest(),
        },
    }


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    def cut():
        yield b"a"
        raise DataError("b: broken")

    with pytest.raises(DataError, match="b: broken"):
        write(tmp_path, cut())
    with pytest.raises(DataError, match="no record is left"):
        write(tmp_path, [])
    assert os.listdir(tmp_path) == []


def test_the_layout_of_another_process_that_was_faster_is_taken(tmp_path):
    def contents():
        write(tmp_path)
        yield from DOCUMENTS

    assert len(write(tmp_path, contents())) == 3
    assert len(os.listdir(tmp_path)) == 1


DAMAGE = {
    "data.bin": [lambda b: b[:-1], lambda b: b + b"x", None],
    "offsets.npy": [
        lambda b: b[:-1],
        lambda b: b[:70],
        lambda b: b"",
        lambda b: b"PK" + b[2:],
        lambda b: b.replace((3).to_bytes(8, "little"), (-5).to_bytes(8, "little", signed=True)),
        None,
    ],
    "manifest.json": [
        lambda b: b[:-9],
        lambda b: b"[]",
        lambda b: b"{}",
        lambda b: b"\xff",
        lambda b: b"[" * 100_000,
        lambda b: b.replace(b"bad_records", b"x"),
        None,
    ],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_layout_is_named_with_what_to_do(tmp_path, name):
    for damage in DAMAGE[name]:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        (directory,) = Path(write(tmp_path / "c").documents.source).parent.parent.iterdir()
        old = (directory / name).read_bytes()
        (directory / name).unlink()
        if damage:
            (directory / name).write_bytes(damage(old))
        with pytest.raises(DataError, match=f"^{directory}: damaged .*; remove it") as raised:
            flatten(str(tmp_path / "c"), "my set", {"k": 1}, never(), BadRecords(0))
        assert "\n" not in str(raised.value)


def test_a_pickle_in_place_of_the_offsets_is_not_loaded(tmp_path):
    directory = Path(write(tmp_path).documents.source).parent
    np.save(directory / "offsets.npy", np.array([print], object), allow_pickle=True)
    manifest = json.loads((directory / "manifest.json").read_text())
    digest = hashlib.sha256((directory / "offsets.npy").read_bytes()).hexdigest()
    manifest["sha256"]["offsets.npy"] = digest
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged"):
        write(tmp_path, never())


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    corpus = write(tmp_path)
    corpus.verify()
    source = Path(corpus.documents.source)
    source.write_bytes(source.read_bytes()[:-1] + b"E")
    with pytest.raises(DataError, match=f"^{source.parent}: damaged .*SHA-256"):
        write(tmp_path, never()).verify()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^data.cache_dir='{tmp_path}/file': .*; accepted is"):
        write(tmp_path / "file")


def test_the_default_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = flatten("", "s", {}, iter(DOCUMENTS), BadRecords(0))
    assert Path(corpus.documents.source).is_relative_to(tmp_path / "megabyte_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    corpus = flatten("", "s", {}, iter(DOCUMENTS), BadRecords(0))
    assert Path(corpus.documents.source).is_relative_to(tmp_path / ".cache" / "megabyte_jax")


MILLIONS = """
import resource, sys
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.flat import flatten
from megabyte_jax.data.windows import TrainWindows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = flatten(sys.argv[1], "s", {}, None, BadRecords(0))
assert len(corpus) == 5_000_000
windows = TrainWindows(corpus, 1000, 8, seed=0)
assert all(windows.batch(step).shape == (8, 1000) for step in range(100))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_millions_of_documents_take_no_memory(tmp_path):
    corpus = flatten(str(tmp_path), "s", {}, [b"1"], BadRecords(0))
    directory, documents = Path(corpus.documents.source).parent, 5_000_000
    np.save(directory / "offsets.npy", np.arange(0, 1000 * documents + 1, 1000))
    os.truncate(directory / "data.bin", 1000 * documents)
    digest = hashlib.sha256((directory / "offsets.npy").read_bytes()).hexdigest()
    manifest = {**corpus.manifest, "documents": documents, "bytes": 1000 * documents}
    manifest["sha256"] = {"data.bin": "", "offsets.npy": digest}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-c", MILLIONS, str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, check=True, text=True)
    assert int(grown.stdout) < 60_000  # KiB
