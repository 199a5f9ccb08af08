import io
import math

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from megabyte_jax.errors import NonFiniteError
from megabyte_jax.metrics import Reporter
from tests import runs


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


def events(workdir):
    """(step, tag, value) of the scalars in the event files, in the order of the files' names."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        file = io.BytesIO(path.read_bytes())
        while header := file.read(12):  # length, checksum
            event = Event.FromString(file.read(int.from_bytes(header[:8], "little")))
            file.read(4)
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


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_between_records_too(tmp_path, name, value):
    with reporter(tmp_path) as report, pytest.raises(NonFiniteError, match="update 1: .*0.5 may"):
        report.update(1, metrics(**{name: value}))
    assert runs.records(tmp_path) == []


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
