import contextlib
import gzip
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus, open_corpus
from megabyte_jax.errors import DataError, UserError

COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def contents(corpus: Corpus) -> dict[str, bytes]:
    return {document.name: document.data.tobytes() for document in corpus}


def contents_names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus]


def error_of(source: object) -> str:
    with pytest.raises(UserError) as raised:
        open_corpus(str(source))
    message = str(raised.value)
    assert message.startswith(f"data.source={str(source)!r}: ") and "accepted: stdlib" in message
    assert "\n" not in message
    return message


def bad_file_of(source: object) -> str:
    with pytest.raises(DataError) as raised:
        open_corpus(str(source))
    message = str(raised.value)
    assert "\n" not in message and message.endswith(
        "; a larger data.max_bad_records=0 would leave it out"
    )
    return message


@contextlib.contextmanager
def without_privileges():
    """Root reads everything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_gives_its_files_sorted_by_relative_name(tmp_path):
    files = {"b.txt": b"\x00\xff", "a/z.txt": b"z", "a.txt": b"\r\n"}
    corpus = open_corpus(write(tmp_path, files))
    assert [document.name for document in corpus] == ["a.txt", "a/z.txt", "b.txt"]
    assert contents(corpus) == files
    assert (len(corpus), corpus.num_bytes, corpus.name) == (3, 5, str(tmp_path))


def test_hidden_files_are_left_out_and_linked_folders_make_no_loop(tmp_path):
    write(tmp_path, {".git/x": b"1", "a/.b": b"2", "a/c": b"3"})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "c")
    expected = {"a/c": b"3", "link": b"3"}
    assert contents(open_corpus(str(tmp_path))) == expected
    assert contents(open_corpus(f"{tmp_path}/**")) == expected
    assert contents(open_corpus(f"{tmp_path}/**/*")) == expected


def test_a_glob_gives_the_files_that_match(tmp_path):
    write(tmp_path, {"x/a.txt": b"1", "x/y/b.txt": b"2", "x/y/c.md": b"3", "d.txt": b"4"})
    assert contents(open_corpus(f"{tmp_path}/x/**/*.txt")) == {"a.txt": b"1", "y/b.txt": b"2"}
    assert contents(open_corpus(f"{tmp_path}/?.txt")) == {"d.txt": b"4"}


def test_a_name_that_looks_like_a_glob_is_a_file_when_it_exists(tmp_path):
    write(tmp_path, {"a[1].txt": b"1", "a1.txt": b"2"})
    assert contents(open_corpus(f"{tmp_path}/a[1].txt")) == {"a[1].txt": b"1"}


def test_a_relative_path_and_a_home_folder_are_found(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"1"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("a.txt", "*.txt", ".", "~/a.txt", "./**/a.txt"):
        assert contents(open_corpus(source)) == {"a.txt": b"1"}


@pytest.mark.parametrize("suffix", COMPRESS)
@settings(deadline=None, max_examples=20)
@given(documents=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=3))
def test_compressed_files_hold_what_was_compressed(suffix, documents):
    documents.append(b"\x00" * 5000)
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{i}.txt{suffix}": COMPRESS[suffix](data) for i, data in enumerate(documents)}
        corpus = open_corpus(write(Path(folder), files))
    assert contents(corpus) == {f"{i}.txt": data for i, data in enumerate(documents)}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_may_have_several_members(tmp_path, suffix):
    data = np.random.default_rng(0).bytes(5000)
    write(tmp_path, {f"a{suffix}": COMPRESS[suffix](data) + COMPRESS[suffix](b"end")})
    assert contents(open_corpus(str(tmp_path))) == {"a": data + b"end"}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path, suffix, damage):
    good = COMPRESS[suffix](np.random.default_rng(0).bytes(5000))
    bad = {"truncated": good[:-9], "flipped": b"\x00" + good[1:], "not compressed": b"plain"}
    source = write(tmp_path, {"fine.txt": b"1", f"bad{suffix}": bad[damage]})
    assert bad_file_of(source).startswith(f"{tmp_path}/bad{suffix}: cannot be unpacked (")


def test_bad_files_within_the_tolerance_are_left_out_and_told(tmp_path, capsys):
    good = {"a": b"1", "b.gz": gzip.compress(b"22"), "d.xz": lzma.compress(b"33")}
    write(tmp_path, {**good, "c.gz": gzip.compress(b"x" * 999)[:-9], "e": b"", "f.gz": b"plain"})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="f.gz: .* a larger data.max_bad_records=3 would"):
        open_corpus(str(tmp_path), bad=BadRecords(3))
    bad = BadRecords(4)
    assert contents(open_corpus(str(tmp_path), bad=bad)) == {"a": b"1", "b": b"22", "d": b"33"}
    assert bad.count == 4
    bad.report()
    assert capsys.readouterr().err == (
        f"left out 4 bad records, the first: {tmp_path}/e: holds no byte\n"
    )


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path):
    write(tmp_path, {"a": b"", "b": b""})
    with pytest.raises(DataError, match="all of its 2 files were left out"):
        open_corpus(str(tmp_path), bad=BadRecords(9))


@settings(deadline=None)
@given(
    data=st.binary(min_size=1, max_size=99), spans=st.lists(st.tuples(*[st.integers(0, 99)] * 2))
)
def test_reading_a_part_gives_the_bytes_of_the_part(data, spans):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {"plain": data, "packed.gz": gzip.compress(data)})
        for document in open_corpus(folder):
            for start, stop in map(sorted, spans):
                out = np.zeros(len(data[start:stop]), np.uint8)
                document.read(start, out)
                assert out.tobytes() == data[start:stop]


def test_data_cannot_be_written_to(tmp_path):
    write(tmp_path, {"a": b"1", "c.gz": gzip.compress(b"2")})
    for document in open_corpus(str(tmp_path)):
        assert document.data.dtype == np.uint8 and not document.data.flags.writeable


def test_a_document_that_shrinks_or_goes_is_an_error_and_not_a_crash(tmp_path):
    write(tmp_path, {"a": b"12345"})
    (document,) = open_corpus(str(tmp_path / "a"))
    for change in (lambda: write(tmp_path, {"a": b"123"}), (tmp_path / "a").unlink):
        change()
        with pytest.raises(DataError, match="/a: changed while in use.*5 bytes"):
            _ = document.data
        with pytest.raises(DataError, match="/a: changed while in use.*5 bytes"):
            document.read(2, np.zeros(3, np.uint8))


def test_the_standard_library_is_python_source_without_tests():
    corpus = open_corpus("stdlib")
    assert corpus.name.startswith(f"stdlib-{sys.version_info.major}.{sys.version_info.minor}")
    assert corpus.num_bytes > 5_000_000
    names = [document.name for document in corpus]
    assert {"ast.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "sitecustomize.py", "idlelib"}
    assert all(name.endswith(".py") and not name.startswith("_sysconfigdata") for name in names)


def test_sources_that_hold_nothing_are_errors(tmp_path):
    write(tmp_path, {"empty": b"", "folder/.hidden": b"1", "e.gz": gzip.compress(b"")})
    assert "no such file" in error_of(tmp_path / "missing")
    assert "no such file" in error_of("")
    assert "no file found" in error_of(tmp_path / "folder")
    assert "no file found" in error_of(tmp_path / "*.txt")
    assert bad_file_of(tmp_path / "empty").startswith(f"{tmp_path}/empty: holds no byte")
    assert bad_file_of(tmp_path / "e.gz").startswith(f"{tmp_path}/e.gz: holds no byte")


def test_sources_that_are_no_path_are_errors(tmp_path):
    error_of("a\x00b")
    error_of("a\nb")
    error_of("x" * 5000)
    error_of(tmp_path / "**" / "[")


def test_what_is_not_a_regular_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: not a regular file" in bad_file_of(tmp_path / "pipe")
    assert "pipe: not a regular file" in bad_file_of(tmp_path)
    assert "/dev/null: not a regular file" in bad_file_of("/dev/null")
    (tmp_path / "pipe").unlink()
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert "self: Too many levels of symbolic links" in bad_file_of(tmp_path / "self")
    assert "self: Too many levels of symbolic links" in bad_file_of(tmp_path)


@pytest.mark.parametrize("source", ["", "/folder/a", "/folder", "/*/*"])
def test_what_may_not_be_read_is_an_error(source):
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        write(Path(root), {"folder/a": b"1", "b": b"1"})
        os.chmod(f"{root}/folder/a", 0)
        with without_privileges():
            message = bad_file_of(root + source)
    assert message.startswith(f"{root}/folder/a: Permission denied")


def test_a_folder_that_may_not_be_searched_is_an_error():
    with tempfile.TemporaryDirectory() as root:
        write(Path(root), {"folder/a": b"1", "b": b"1"})
        os.chmod(f"{root}/folder", 0)
        os.chmod(root, 0o755)
        with without_privileges():
            message = bad_file_of(root)
        os.chmod(f"{root}/folder", 0o755)
    assert message.startswith(f"{root}/folder: Permission denied")


@pytest.mark.parametrize("pattern", ["**", "**/*", "*/*", "**/a", "folder/*", "*/folder/*"])
def test_a_glob_says_what_it_cannot_search(pattern):
    with tempfile.TemporaryDirectory() as root:
        write(Path(root), {"folder/a": b"1", "a": b"1", "deep/folder/a": b"1"})
        locked = f"{root}/deep/folder" if pattern.startswith("*/f") else f"{root}/folder"
        os.chmod(locked, 0)
        os.chmod(root, 0o755)
        with without_privileges():
            message = bad_file_of(f"{root}/{pattern}")
            bad = BadRecords(1)
            left = open_corpus(f"{root}/*", bad=bad)
        os.chmod(locked, 0o755)
    assert message.startswith(f"{locked}: Permission denied")
    assert contents_names(left) == ["a"] and bad.count == 0


def test_a_name_that_comes_twice_is_an_error(tmp_path):
    write(tmp_path, {"a": b"1", "a.gz": gzip.compress(b"1")})
    with pytest.raises(DataError, match=f"^{tmp_path}/a: is there twice"):
        open_corpus(str(tmp_path))


def test_the_error_names_the_option_that_was_used():
    with pytest.raises(UserError, match="^--data='missing': "):
        open_corpus("missing", option="--data")


HUGE = """
import resource, sys
from megabyte_jax.data.corpus import open_corpus
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = open_corpus(sys.argv[1])
assert corpus.num_bytes == (5 << 30) + 300
assert sum(int(document.data[-1]) for document in corpus) == 300 * ord("1")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_huge_file_takes_no_memory_and_many_files_no_descriptors(tmp_path):
    write(tmp_path, {f"small/{i}": b"1" for i in range(300)})
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(5 << 30)
    command = [sys.executable, "-c", HUGE, str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, check=True, text=True)
    assert int(grown.stdout) < 50_000  # KiB


@settings(deadline=None, max_examples=50)
@given(source=st.text(st.characters(exclude_characters=".")))
def test_any_text_is_a_source_or_an_error_in_one_line(source):
    with tempfile.TemporaryDirectory() as folder:
        message = error_of(f"{folder}/{source}")
    assert len(message.splitlines()) == 1
