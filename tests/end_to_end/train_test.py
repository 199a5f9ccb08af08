import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from megabyte_jax import config_keys, load
from megabyte_jax.data import windows
from megabyte_jax.errors import CheckpointError, NonFiniteError, UserError
from tests import runs, xla

# Orbax leaves reads behind when one fails.
READS_GIVEN_UP = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TIMES = ("bytes_per_second", "utilisation")


def require_same_run(workdir, other):
    """Same checkpoints and records bit for bit, but for how long things took."""
    assert runs.saved_steps(workdir) == runs.saved_steps(other)
    for step in runs.saved_steps(workdir):
        one, two = (runs.saved_state(path, step) for path in (workdir, other))
        assert jax.tree.structure(one) == jax.tree.structure(two)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    one, two = (
        [{k: v for k, v in record.items() if k not in TIMES} for record in runs.records(path)]
        for path in (workdir, other)
    )
    assert one == two


def interrupt_at(monkeypatch, step):
    """The batch of update `step` (from 0) interrupts the run."""
    rows = windows.TrainWindows.rows

    def interrupted(self, at, first, count):
        if at == step:
            raise KeyboardInterrupt
        return rows(self, at, first, count)

    monkeypatch.setattr(windows.TrainWindows, "rows", interrupted)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(
    step, finished_run, text_dir, tmp_path, monkeypatch
):
    config, workdir = runs.tiny_config(text_dir), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        runs.train(config, workdir)
    assert runs.saved_steps(workdir) == list(range(2, step + 1, 2))
    runs.train(config, workdir)
    require_same_run(workdir, finished_run)


def test_a_run_whose_process_is_killed_resumes_bit_for_bit(text_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = runs.tiny_config(text_dir, **{"train.num_steps": 200, "checkpoint.interval": 50})
    runs.train(config, whole)
    arguments = [f"--config.{key}={value}" for key, value in changes(config)]
    command = [sys.executable, "train.py", f"--config={runs.ROOT}/configs/base.py"]
    one_device = {**os.environ, "XLA_FLAGS": xla.flags(1)}
    process = subprocess.Popen(
        [*command, f"--workdir={killed}", *arguments],
        cwd=runs.ROOT,
        env=one_device,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while not (killed / "checkpoints" / "50").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < max(runs.saved_steps(killed)) < 200
    runs.train(config, killed)
    require_same_run(killed, whole)


def changes(config):
    """Keys and values in which a config differs from configs/base.py."""
    base, new = (dict(flat(c)) for c in (runs.base.get_config(), config))
    return [(key, value) for key, value in new.items() if value != base[key]]


def flat(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@READS_GIVEN_UP
def test_a_damaged_checkpoint_is_passed_over_and_made_again(
    finished_run, text_dir, tmp_path, damage, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    damage(workdir / "checkpoints" / "6")
    runs.train(runs.tiny_config(text_dir), workdir)
    said = capsys.readouterr().err
    assert "checkpoint 6 cannot be read" in said and "checkpoint 4 is used instead" in said
    assert "updates 4 to 6" in said and "Traceback" not in said
    require_same_run(workdir, finished_run)


@READS_GIVEN_UP
def test_a_run_with_only_damaged_checkpoints_stops_with_status_4(
    finished_run, text_dir, tmp_path, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        damage(checkpoint)
    before = runs.contents(workdir)
    with pytest.raises(CheckpointError, match="none of the checkpoints") as error:
        runs.train(runs.tiny_config(text_dir), workdir)
    assert error.value.exit_status == 4
    assert runs.contents(workdir) == before
    with pytest.raises(CheckpointError):
        load(workdir)


def test_a_finished_run_is_left_as_it_is(finished_run, text_dir, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    runs.train(runs.tiny_config(text_dir), workdir)
    require_same_run(workdir, finished_run)
    assert "updates 6 to 6" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [1e30, 1e20])
def test_a_run_that_diverges_stops_and_saves_nothing_of_it(
    rate, text_dir, tmp_path, capsys, monkeypatch
):
    # No rate that is accepted does it at once.
    any_rate = config_keys.KEYS["optimizer.learning_rate"]._replace(ok=lambda x: True)
    monkeypatch.setitem(config_keys.KEYS, "optimizer.learning_rate", any_rate)
    config = runs.tiny_config(
        text_dir, **{"optimizer.learning_rate": rate, "checkpoint.interval": 1}
    )
    with pytest.raises(NonFiniteError, match="learning_rate") as error:
        runs.train(config, tmp_path)
    assert error.value.exit_status == 6
    assert runs.saved_steps(tmp_path) == []
    assert all(math.isfinite(value) for r in runs.records(tmp_path) for value in r.values())


def test_the_work_directory_holds_what_the_design_says(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["model"]["global_model"]["dim"] == 16 and config["train"]["num_steps"] == 6
    assert runs.saved_steps(finished_run) == [4, 6]
    assert len((finished_run / "samples" / "00000006.txt").read_bytes()) == 3
    trained = [record for record in runs.records(finished_run) if "bits_per_byte" in record]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    assert [record["bytes_seen"] for record in trained] == [96 * i for i in range(1, 7)]
    assert all(record["bytes_per_second"] > 0 for record in trained)
    assert abs(trained[0]["bits_per_byte"] - 8) < 0.1
    evaluated = [r for r in runs.records(finished_run) if "eval/bits_per_byte" in r]
    assert [record["step"] for record in evaluated] == [3, 6]
    assert all(300 < record["eval/bytes"] < 700 for record in evaluated)  # some are short


def test_a_sample_of_no_bytes_is_not_taken(text_dir, tmp_path, capsys):
    changes = {"train.num_steps": 2, "sample.num_bytes": 0, "optimizer.warmup_steps": 1}
    runs.train(runs.tiny_config(text_dir, **changes), tmp_path)
    assert runs.saved_steps(tmp_path) == [2] and "sampl" not in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    finished_run, text_dir, tmp_path
):
    runs.train(runs.tiny_config(text_dir), tmp_path / "same")
    require_same_run(tmp_path / "same", finished_run)
    runs.train(runs.tiny_config(text_dir, seed=1), tmp_path / "other")
    one, two = (runs.records(path)[-2]["grad_norm"] for path in (finished_run, tmp_path / "other"))
    assert one != two


def moments(workdir, step):
    """All first and all second moments of a checkpoint."""
    leaves = jax.tree.leaves_with_path(runs.saved_state(workdir, step)["opt_state"])
    return [
        np.concatenate([np.ravel(x) for path, x in leaves if f"'{name}'" in str(path)])
        for name in ("mu", "nu")
    ]


def test_a_resumed_run_has_the_betas_of_the_new_config(finished_run, text_dir, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    betas = {"optimizer.b1": 0.5, "optimizer.b2": 0.6}
    longer = {"train.num_steps": 7, "checkpoint.interval": 1}
    config = runs.tiny_config(text_dir, **betas, **longer)
    with pytest.raises(UserError, match="of optimizer.b1, optimizer.b2, train.num_steps; accepted"):
        runs.train(config, workdir)
    runs.train(config, workdir, accept_config_change=True)
    (mu, nu), (new_mu, new_nu) = moments(finished_run, 6), moments(workdir, 7)
    # The gradient, and its square, that the moments went on with.
    gradient, square = (new_mu - 0.5 * mu) / (1 - 0.5), (new_nu - 0.6 * nu) / (1 - 0.6)
    np.testing.assert_allclose(gradient**2, square, rtol=1e-3, atol=1e-8)
    assert np.abs(square).max() > 1e-4
    before = (new_mu - 0.9 * mu) / (1 - 0.9), (new_nu - 0.98 * nu) / (1 - 0.98)
    assert not np.allclose(before[0] ** 2, before[1], rtol=0.5, atol=1e-6)
