import errno
import io
import math
import os
import sys
import threading

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from megabyte_jax.errors import StorageError
from megabyte_jax.metrics import Reporter
from tests import disks, runs
from tests.tfds_files import masked

LOGS = ("metrics.jsonl", "tensorboard")


def reporter(workdir, start=0, log_interval=2):
    return Reporter(
        workdir,
        start=start,
        num_steps=9,
        bytes_per_step=10,
        log_interval=log_interval,
        peak=1e6,
    )


def metrics(**changes):
    values = {"loss": math.log(2), "grad_norm": 2.0, "param_norm": 3.0, "learning_rate": 0.5}
    return {name: np.float32(value) for name, value in {**values, **changes}.items()}


def raw_events(workdir):
    """What the event files hold, in the order of their names; the checksums are held to."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        file = io.BytesIO(path.read_bytes())
        while length := file.read(8):
            assert file.read(4) == masked(length)
            contents = file.read(int.from_bytes(length, "little"))
            assert file.read(4) == masked(contents)
            yield Event.FromString(contents)


def events(workdir):
    """(step, tag, value) of the scalars in the event files."""
    for event in raw_events(workdir):
        for value in event.summary.value:
            yield event.step, value.tag, value.simple_value


def test_training_is_recorded_at_its_interval_and_at_the_end(tmp_path, capsys):
    with reporter(tmp_path) as report:
        for step in range(1, 10):
            report.update(step, metrics())
    records = runs.records(tmp_path)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 9]
    assert [record["bytes_seen"] for record in records] == [20, 40, 60, 80, 90]
    first = records[0]
    assert first["bits_per_byte"] == pytest.approx(1) and first["bytes_per_second"] > 0
    assert first["utilisation"] == pytest.approx(first["bytes_per_second"] / 1e6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[-1].startswith("step 9/9  0.00 MB seen  1.000 bits/byte")


def test_tensorboard_gets_what_the_records_hold(tmp_path):
    with reporter(tmp_path) as report:
        report.update(2, metrics())
        report.evaluation(2, 1.5, 77)
    expected = {
        (record["step"], name if "/" in name else f"train/{name}"): value
        for record in runs.records(tmp_path)
        for name, value in record.items()
        if name != "step"
    }
    made = {(step, tag): value for step, tag, value in events(tmp_path)}
    assert made.keys() == expected.keys() and len(made) == 9
    np.testing.assert_allclose(list(made.values()), [expected[key] for key in made], rtol=1e-6)


def test_records_after_the_step_a_run_resumes_at_are_dropped(tmp_path):
    with reporter(tmp_path) as report:
        for step in (2, 4, 6):
            report.update(step, metrics())
            report.evaluation(step, step, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "bits')  # the process was killed here
    with reporter(tmp_path, start=5) as report:
        report.update(6, metrics(loss=0.0))
    assert [record["step"] for record in runs.records(tmp_path)] == [2, 2, 4, 4, 6]
    assert runs.records(tmp_path)[-1]["bits_per_byte"] == 0


def test_pauses_do_not_count_as_training(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 101.0, 103.0])  # opened, pause from 1 to 101, record
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with reporter(tmp_path, log_interval=1) as report:
        with report.paused("compiling"):
            pass
        report.update(1, metrics())
    assert runs.records(tmp_path)[0]["bytes_per_second"] == pytest.approx(10 / 3)


def test_a_sample_is_kept_as_bytes_and_shown_as_text(tmp_path, capsys):
    with reporter(tmp_path) as report:
        report.sample(3, b"a\xff\x1b")
    assert (tmp_path / "samples" / "00000003.txt").read_bytes() == b"a\xff\x1b"
    assert "step 3, a sample:\na\\xff\\x1b\n" in capsys.readouterr().err


def test_a_sample_that_is_no_text_is_kept_and_its_file_named(tmp_path, capsys):
    with reporter(tmp_path) as report:
        report.sample(3, b"\x89PNG", ".png")
    path = tmp_path / "samples" / "00000003.png"
    assert path.read_bytes() == b"\x89PNG"
    assert f"step 3, a sample in {path}\n" in capsys.readouterr().err


def test_a_file_of_events_says_its_version_and_from_which_step_on_it_counts(tmp_path):
    with reporter(tmp_path, start=5) as report:
        report.update(6, metrics())
    version, begin, scalars = raw_events(tmp_path)
    assert version.file_version == "brain.Event:2" and version.step == 0
    assert begin.session_log.status == begin.session_log.START and begin.step == 6
    assert scalars.step == 6 and version.wall_time <= begin.wall_time <= scalars.wall_time


def test_a_full_disk_neither_ends_a_run_nor_holds_it_up_nor_loses_a_record(tmp_path, capsys):
    with disks.small_disk(tmp_path / "disk", 1 << 17) as disk:
        with reporter(disk, log_interval=1) as report:
            report.update(1, metrics())
            with disks.filled(disk):
                for step in range(2, 80):  # more than fit into what the files have already
                    report.update(step, metrics())
                before = runs.records(disk)
            report.evaluation(80, 1.5, 77)
        records = runs.records(disk)
        steps = [record["step"] for record in records]
        assert steps == [*range(1, 81)] and records[: len(before)] == before and len(before) < 80
        assert sorted({step for step, *_ in events(disk)}) == steps
    said = [line for line in capsys.readouterr().err.splitlines() if "written" in line]
    full = "cannot be written: No space left on device; 1 record waiting"
    assert sorted(said[:2]) == [f"metrics.jsonl {full}", f"tensorboard {full}"]
    assert said[2:] == [f"{log} is written again; nothing lost" for log in LOGS]


def test_a_run_ends_on_a_disk_that_stays_full(tmp_path, capsys):
    with disks.small_disk(tmp_path / "disk", 1 << 17) as disk:
        with disks.filled(disk), reporter(disk, log_interval=1) as report:
            for step in range(1, 10):
                report.update(step, metrics())
        assert runs.records(disk) == [] and list(raw_events(disk)) == []
    lines = capsys.readouterr().err.splitlines()
    full = "cannot be written: No space left on device"
    assert lines[-2:] == [
        f"metrics.jsonl {full}; 9 records lost",
        f"tensorboard {full}; 11 records lost",
    ]


def test_a_log_that_cannot_be_cut_back_is_left_as_it_was(tmp_path):
    with disks.small_disk(tmp_path / "disk", 1 << 17) as disk:
        with reporter(disk, log_interval=1) as report:
            for step in range(1, 60):
                report.update(step, metrics())
        before = (disk / "metrics.jsonl").read_bytes()
        with disks.filled(disk):
            with pytest.raises(StorageError, match=f"--workdir={disk}: No space left on device"):
                reporter(disk, start=50)
            with reporter(disk, start=59):  # nothing of it goes, and nothing has to be written
                pass
        assert (disk / "metrics.jsonl").read_bytes() == before
        assert sorted(os.listdir(disk)) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"5", b"[]", b"{}", b'{"step": "1"}', b"[" * 10**5, b"\0" * 99]
)
def test_what_is_no_record_is_dropped(tmp_path, line):
    good = b'{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    with reporter(tmp_path, start=1):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == good + good


@pytest.mark.parametrize("suffix, shown", [(".txt", ":\nabc\n"), (".png", " that is lost")])
def test_a_sample_that_cannot_be_kept_is_said_and_shown(tmp_path, capsys, suffix, shown):
    (tmp_path / "samples").write_text("a file, where the directory should be")
    with reporter(tmp_path) as report:
        report.sample(3, b"abc", suffix)
    said = capsys.readouterr().err
    assert f"samples/00000003{suffix} cannot be written: File exists\n" in said
    assert f"step 3, a sample{shown}\n" in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_stderr_that_takes_nothing_ends_no_run(tmp_path, monkeypatch, number):
    class Gone(io.StringIO):
        def write(self, _):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stderr", Gone())
    with reporter(tmp_path) as report:
        for step in range(1, 10):
            report.update(step, metrics())
    assert len(runs.records(tmp_path)) == 5


def test_lines_of_several_threads_stay_whole(tmp_path, capsys):
    with reporter(tmp_path) as report:
        lines = [[f"{name}{i}" * 40 for i in range(300)] for name in "abc"]
        threads = [threading.Thread(target=lambda x=x: list(map(report.say, x))) for x in lines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    said = capsys.readouterr().err.splitlines()
    assert [[line for line in said if line[0] == name] for name in "abc"] == lines
