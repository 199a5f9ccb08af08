"""The entry points in several processes, as several hosts run them."""

import json
import math
import re
import shutil
import time

import jax
import numpy as np
import pytest

from megabyte_jax import load
from tests import hosts, runs

STEPS = 8
TIMES = ("bytes_per_second", "utilisation")


def config_of(text_dir, **changes):
    """A checkpoint after every second of eight updates, over 8 devices in three ways at once."""
    config = runs.tiny_config(text_dir)
    config.train.update(num_steps=STEPS, batch_size=8, grad_accumulation=1)
    config.mesh.update(data=2, fsdp=2, sequence=2)
    config.checkpoint.update(interval=2, keep=STEPS)
    config.eval.update(interval=4)
    # What makes these tests wait is compiling, which each process does for itself.
    config.sample.num_bytes = 0
    config.model.global_model.dropout = config.model.local_model.dropout = 0.0
    config.update_from_flattened_dict(changes)
    return config


def require_success(outcomes):
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes


def train(logs, config, workdir, num_processes=2):
    port, arguments = hosts.free_port(), hosts.train_arguments(config, workdir)
    outcomes = hosts.launch(
        logs,
        num_processes,
        lambda process: [*arguments, *hosts.flags(process, num_processes, port)],
        8 // num_processes,
    )
    require_success(outcomes)
    return outcomes


def records(workdir):
    return [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in runs.records(workdir)
    ]


def require_close(workdir, other):
    """The same records but for the order in which other devices add up."""
    assert [record.keys() for record in records(workdir)] == [r.keys() for r in records(other)]
    for one, two in zip(records(workdir), records(other), strict=True):
        for name, value in one.items():
            assert math.isclose(value, two[name], rel_tol=1e-5), (one["step"], name)


@pytest.fixture(scope="module")
def whole(text_dir, tmp_path_factory):
    """A run of two processes with four devices each; its work directory and what they said."""
    workdir, logs = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("logs")
    sampling = {"sample.num_bytes": runs.T + 3}  # beyond the context, which then slides on
    return workdir, train(logs, config_of(text_dir, **sampling), workdir)


@pytest.fixture
def early(whole, tmp_path):
    """The same run as it was after its checkpoint at step 6."""
    workdir = tmp_path / "early"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    return workdir


def test_what_a_run_writes_is_written_once(whole):
    workdir, (first, second) = whole
    steps = [record["step"] for record in runs.records(workdir) if "bits_per_byte" in record]
    assert steps == list(range(1, STEPS + 1))
    assert runs.saved_steps(workdir) == [2, 4, 6, 8]
    assert json.loads((workdir / "config.json").read_text())["mesh"]["fsdp"] == 2
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "data.json",
        "lock",
        "metrics.jsonl",
        "samples",
        "tensorboard",
    ]
    assert f"step {STEPS}/{STEPS}" in first.err and second.err == ""


def test_a_run_killed_on_all_hosts_resumes_bit_for_bit_under_slurm(whole, text_dir, tmp_path):
    workdir, port = tmp_path / "run", hosts.free_port()
    arguments = hosts.train_arguments(config_of(text_dir), workdir)
    with hosts.started(
        tmp_path / "killed", 2, lambda process: [*arguments, *hosts.flags(process, 2, port)], 4
    ) as processes:
        deadline = time.monotonic() + 90
        while not (workdir / "checkpoints" / "4").exists() and time.monotonic() < deadline:
            assert [child.poll() for child in processes] == [None, None]
            time.sleep(0.005)
    saved = runs.saved_steps(workdir)
    assert 4 in saved and STEPS not in saved
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "%p",
        "SLURM_LOCALID": "%p",
        "JAX_COORDINATOR_PORT": str(hosts.free_port()),
    }
    outcomes = hosts.launch(tmp_path / "resumed", 2, lambda _: arguments, 4, **slurm)
    require_success(outcomes)
    assert f"updates {max(saved)} to {STEPS}" in outcomes[0].err
    assert records(workdir) == records(whole[0])
    for one, two in zip(
        *(jax.tree.leaves(load(path).params) for path in (workdir, whole[0])), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@pytest.mark.parametrize("devices", [8, 4])
def test_a_run_of_two_processes_goes_on_in_one(devices, early, whole, text_dir):
    config = config_of(text_dir, **{"mesh.data": devices // 4})
    runs.train(config, early, num_devices=devices)
    require_close(early, whole[0])


def test_a_run_of_two_processes_goes_on_in_four(early, whole, text_dir, tmp_path):
    outcomes = train(tmp_path / "logs", config_of(text_dir), early, num_processes=4)
    assert f"updates 6 to {STEPS}" in outcomes[0].err
    require_close(early, whole[0])


@pytest.mark.parametrize(
    "options, difference",
    [
        (
            [f"--config.optimizer.learning_rate=0.00{n}" for n in (1, 2)],
            "optimizer.learning_rate: 0.001 on process 0, 0.002 on process 1",
        ),
        (
            ["--noaccept_config_change", "--accept_config_change"],
            "--accept_config_change: False on process 0, True on process 1",
        ),
    ],
)
def test_hosts_that_disagree_about_the_config_all_stop_and_say_the_same(
    options, difference, text_dir, tmp_path
):
    port, workdir = hosts.free_port(), tmp_path / "run"
    arguments = hosts.train_arguments(config_of(text_dir), workdir)
    outcomes = hosts.launch(
        tmp_path / "logs",
        2,
        lambda process: [*arguments, options[process], *hosts.flags(process, 2, port)],
        4,
    )
    line = f"train.py: error: {difference}; accepted is the same config on all processes\n"
    assert [(outcome.status, outcome.err) for outcome in outcomes] == [(2, line)] * 2
    assert not workdir.exists()


def test_data_that_one_host_lacks_stop_all_of_them(text_dir, tmp_path):
    port, workdir = hosts.free_port(), tmp_path / "run"
    arguments = hosts.train_arguments(config_of("~/text"), workdir)
    for process in range(2):
        (tmp_path / str(process)).mkdir()
    (tmp_path / "0" / "text").symlink_to(text_dir)
    outcomes = hosts.launch(
        tmp_path / "logs",
        2,
        lambda process: [*arguments, *hosts.flags(process, 2, port)],
        4,
        HOME=f"{tmp_path}/%p",
    )
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[0].err == outcomes[1].err
    assert outcomes[0].err.startswith("train.py: error: on process 1: ")
    assert "text" in outcomes[0].err and outcomes[0].err.count("\n") == 1
    assert not workdir.exists()


def test_data_that_differ_between_hosts_stop_all_of_them(text_dir, tmp_path):
    port, workdir = hosts.free_port(), tmp_path / "run"
    arguments = hosts.train_arguments(config_of("~/text"), workdir)
    for process in range(2):
        shutil.copytree(text_dir, tmp_path / str(process) / "text")
    for path in (tmp_path / "1" / "text").iterdir():
        with path.open("a") as file:
            file.write("more")
    outcomes = hosts.launch(
        tmp_path / "logs",
        2,
        lambda process: [*arguments, *hosts.flags(process, 2, port)],
        4,
        HOME=f"{tmp_path}/%p",
    )
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[0].err == outcomes[1].err
    line = (
        r"train.py: error: train: '.*' on process 0, '.*' on process 1; accepted is the same data"
    )
    assert re.fullmatch(f"{line} on all processes\n", outcomes[0].err)
    assert not workdir.exists()


def test_another_version_of_the_code_on_one_host_stops_all_of_them(text_dir, tmp_path):
    port, workdir = hosts.free_port(), tmp_path / "run"
    _, *arguments = hosts.train_arguments(config_of(text_dir), workdir)
    other = tmp_path / "other"
    shutil.copytree(runs.ROOT / "megabyte_jax", other / "megabyte_jax")
    shutil.copy(runs.ROOT / "train.py", other)
    with (other / "megabyte_jax" / "optimizer.py").open("a") as file:
        file.write("# another version\n")
    scripts = runs.ROOT / "train.py", other / "train.py"
    outcomes = hosts.launch(
        tmp_path / "logs",
        2,
        lambda process: [str(scripts[process]), *arguments, *hosts.flags(process, 2, port)],
        4,
    )
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[0].err == outcomes[1].err
    line = r"train.py: error: source of megabyte_jax \(its digest\): '.*' on process 0, '.*' on"
    said = f"{line} process 1; accepted is the same version on all processes\n"
    assert re.fullmatch(said, outcomes[0].err) and not workdir.exists()


def test_two_processes_evaluate_as_one_does(whole, tmp_path):
    workdir, port = whole[0], hosts.free_port()
    arguments = ["eval.py", f"--workdir={workdir}", "--strategy=sliding"]
    several, one = tmp_path / "two.json", tmp_path / "one.json"
    outcomes = hosts.launch(
        tmp_path / "logs",
        2,
        lambda process: [*arguments, f"--output={several}", *hosts.flags(process, 2, port)],
        4,
    )
    require_success(outcomes)
    assert "bits_per_byte" in outcomes[0].out and "bits_per_byte" not in outcomes[1].out
    assert runs.run_main("eval", *arguments[1:], f"--output={one}") == 0
    two, one = (json.loads(path.read_text()) for path in (several, one))
    for name in one.keys() - set(TIMES):
        if isinstance(one[name], str) or one[name] is None:
            assert two[name] == one[name]
        else:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name)
