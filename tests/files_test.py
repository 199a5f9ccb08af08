import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax import files
from tests import disks, runs

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EFBIG")


def opened(path):
    said = []
    return files.Log(path, "the log", said.append), said


def fail(error):
    number = getattr(errno, error)
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("error", ERRORS)
def test_what_cannot_be_written_waits_and_is_said_once_each_time(tmp_path, monkeypatch, error):
    log, said = opened(tmp_path / "log")
    for times in (1, 2):
        log.append(b"a\n")
        with monkeypatch.context() as patched:
            patched.setattr("os.write", lambda *_: fail(error))
            log.append(b"b\n")
            log.append(b"c\n")
        assert (tmp_path / "log").read_bytes() == b"a\nb\nc\nd\n" * (times - 1) + b"a\n"
        log.append(b"d\n")
        assert (tmp_path / "log").read_bytes() == b"a\nb\nc\nd\n" * times
        assert said == times * [
            f"the log cannot be written: {os.strerror(getattr(errno, error))}; 1 record waiting",
            "the log is written again; nothing lost",
        ]


def test_a_record_on_a_full_disk_is_whole_or_not_there(tmp_path):
    with disks.small_disk(tmp_path / "disk", 1 << 16) as disk:
        log, said = opened(disk / "log")
        records = [b"%d " % i * 700 + b"\n" for i in range(9)]  # of no whole number of pages
        log.append(records[0])
        with disks.filled(disk):
            for record in records[1:5]:
                log.append(record)
            written = (disk / "log").read_bytes()
            assert written == b"".join(records[: written.count(b"\n")])
            assert said == ["the log cannot be written: No space left on device; 1 record waiting"]
        for record in records[5:]:
            log.append(record)
        assert (disk / "log").read_bytes() == b"".join(records)


def test_a_file_that_may_not_grow_keeps_whole_records(tmp_path):
    code = (
        "import pathlib, resource, sys\n"
        "from megabyte_jax import files\n"
        "log = files.Log(pathlib.Path(sys.argv[1]), 'the log', print)\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))\n"
        "for i in range(10): log.append(b'%d' % i * 299 + b'\\n')\n"
        "print(pathlib.Path(sys.argv[1]).stat().st_size)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "log.close()\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "log"]
    made = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    reason, size, again = made.stdout.splitlines()
    assert reason == "the log cannot be written: File too large; 1 record waiting"
    assert size == "900" and again == "the log is written again; nothing lost"
    assert (tmp_path / "log").read_text() == "".join(f"{i}" * 299 + "\n" for i in range(10))


STEPS = st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 30), st.booleans())


@given(st.lists(STEPS), st.integers(1, 9))
def test_wherever_a_disk_fills_up_no_half_of_a_record_stays(steps, at_once):
    """Of each record: how many bytes the disk takes meanwhile, and whether files can be cut."""
    write, cut, room = os.write, os.ftruncate, 0

    def short(file, data):
        nonlocal room
        room -= (taken := min(room, at_once, len(data)))
        return write(file, data[:taken]) if taken else fail("ENOSPC")

    with tempfile.TemporaryDirectory() as directory, mock.patch("os.write", short):
        path, wholes = Path(directory) / "log", {b""}
        log, _ = opened(path)
        for record, space, can_cut in steps:
            room = space
            with mock.patch("os.ftruncate", cut if can_cut else lambda *_: fail("EIO")):
                log.append(record)
            wholes.add(max(wholes, key=len) + record)
            assert path.read_bytes() in wholes or not can_cut
        room = 1 << 20
        log.close()
        assert path.read_bytes() == max(wholes, key=len)


def test_of_too_many_that_wait_the_oldest_are_lost_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_WAITING", 3)
    log, said = opened(tmp_path / "log")
    for records in (b"abcde", b"g"):
        with monkeypatch.context() as patched:
            patched.setattr("os.write", lambda *_: fail("ENOSPC"))
            for record in records:
                log.append(bytes([record]))
        log.append(b"f")
    assert (tmp_path / "log").read_bytes() == b"defgf"
    assert said[1::2] == [
        f"the log is written again; {lost} lost" for lost in ("3 records", "nothing")
    ]


def test_half_of_a_record_that_was_lost_is_cut_off_before_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_WAITING", 1)
    log, _ = opened(tmp_path / "log")
    write, takes = os.write, [4, 0]
    with monkeypatch.context() as patched:
        patched.setattr("os.ftruncate", lambda *_: fail("EIO"))
        patched.setattr("os.write", lambda file, x: write(file, x[: takes.pop(0)]) or fail("EIO"))
        log.append(b"long and lost")
    assert (tmp_path / "log").read_bytes() == b"long"
    log.append(b"new")
    assert (tmp_path / "log").read_bytes() == b"new"


def test_what_still_waits_at_the_end_is_said_to_be_lost(tmp_path, monkeypatch):
    log, said = opened(tmp_path / "log")
    monkeypatch.setattr("os.write", lambda *_: fail("ENOSPC"))
    log.append(b"a")
    log.append(b"b")
    log.close()
    assert said[1:] == ["the log cannot be written: No space left on device; 2 records lost"]


def test_a_directory_that_vanished_is_not_made_again_but_waited_for(tmp_path):
    (tmp_path / "run").mkdir()
    log, said = opened(tmp_path / "run/log")
    log.append(b"a")
    (tmp_path / "run").rename(tmp_path / "gone")
    log.append(b"b")
    (tmp_path / "run").mkdir()  # as the empty directory under a disk that was unmounted
    log.append(b"c")
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run").rmdir()
    (tmp_path / "gone").rename(tmp_path / "run")
    log.append(b"d")
    assert (tmp_path / "run/log").read_bytes() == b"abcd"
    assert said[0] == "the log cannot be written: No such file or directory; 1 record waiting"


def test_a_file_is_replaced_whole_or_left(tmp_path):
    with disks.small_disk(tmp_path / "disk", 1 << 16) as disk:
        files.replace(disk / "file", b"old")
        with disks.filled(disk), pytest.raises(OSError, match="No space left"):
            files.replace(disk / "file", bytes(9000))
        assert runs.contents(disk) == {"file": b"old"}
        files.replace(disk / "file", b"new")
        assert runs.contents(disk) == {"file": b"new"}
