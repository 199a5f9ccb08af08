import json
import os
import socket
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax import distributed, joining, sharding
from megabyte_jax.errors import PeerError, UserError
from tests import hosts

MESHES = [
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"sequence": 8},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"tensor": 8},
]


def mesh_of(sizes, devices=None):
    whole = dict.fromkeys(sharding.AXES, 1) | sizes
    return sharding.make_mesh(whole, jax.devices() if devices is None else devices)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_a_batch_lies_where_device_put_would_put_it(sizes, rows, columns):
    x = np.random.default_rng(rows).integers(0, 256, (8 * rows, 8 * columns), np.uint8)
    place = sharding.batch_sharding(mesh_of(sizes))
    read = []

    def rows_of(first, count):
        read.extend(range(first, first + count))
        return x[first : first + count]

    batch, expected = distributed.put_batch(rows_of, x.shape, place), jax.device_put(x, place)
    assert batch.sharding == expected.sharding and batch.dtype == np.uint8
    for one, two in zip(batch.addressable_shards, expected.addressable_shards, strict=True):
        assert one.device == two.device and one.index == two.index
        np.testing.assert_array_equal(one.data, two.data)
    assert read == list(range(len(x)))
    np.testing.assert_array_equal(distributed.fetch(batch), x)


def test_a_batch_on_some_of_the_devices_is_read_row_by_row():
    x = np.arange(12, dtype=np.uint8).reshape(4, 3)
    place = sharding.batch_sharding(mesh_of({"data": 2}, jax.devices()[3:5]))
    batch = distributed.put_batch(lambda first, count: x[first : first + count], x.shape, place)
    np.testing.assert_array_equal(batch, x)


def test_a_process_by_itself_agrees_with_itself(tmp_path):
    assert distributed.is_primary()
    distributed.agree("config", {"a": 1})
    distributed.require_shared(tmp_path)
    assert [distributed.anywhere(flag) for flag in (False, True)] == [False, True]
    with distributed.together():
        pass
    with pytest.raises(UserError, match="^wrong$"), distributed.together():
        raise UserError("wrong")
    assert list(tmp_path.iterdir()) == []


@given(
    coordinator=st.sampled_from(["", "host:8476", "[::1]:1"]) | st.text(max_size=12),
    num_processes=st.integers(-3, 3) | st.integers(),
    process_id=st.integers(-3, 3) | st.integers(),
)
def test_flags_that_cannot_be_are_refused_and_others_join(coordinator, num_processes, process_id):
    joined = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "_join", lambda *_, **given: joined.append(given))
        try:
            distributed.start(coordinator, num_processes, process_id)
        except UserError as error:
            text = str(error)
            assert text.startswith("--") and "accepted is" in text and len(text.splitlines()) == 1
            assert not joined
        else:
            given = [
                (g["coordinator_address"], g["num_processes"], g["process_id"]) for g in joined if g
            ]
            if (coordinator, process_id) == ("", -1) and num_processes in (-1, 1):
                assert not given
            else:
                assert given == [(coordinator, num_processes, process_id)]
                assert (
                    0 <= process_id < num_processes and 0 < int(coordinator.split(":")[-1]) < 65536
                )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("localhost:8476", -1, -1), "--num_processes=-1"),
        (("localhost:8476", 2, -1), "--process_id=-1.* from 0 to 1"),
        (("localhost:8476", 2, 2), "--process_id=2.* from 0 to 1"),
        (("localhost:8476", 0, 0), "--num_processes=0.* at least 1"),
        (("", 2, 0), "--coordinator=''.*HOST:PORT"),
        (("", 2, -1), "--coordinator=''"),
        (("", -1, 0), "--coordinator=''"),
        (("localhost", 2, 0), "--coordinator='localhost'"),
        (("localhost:0", 2, 0), "--coordinator='localhost:0'"),
        (("localhost:65536", 2, 0), "--coordinator='localhost:65536'"),
        (("http://localhost:1", 2, 0), "--coordinator='http"),
    ],
)
def test_each_mistake_names_its_flag(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*flags)


def test_a_port_that_is_taken_is_told():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--coordinator=localhost:{port}: .*in use"):
            distributed.start(f"localhost:{port}", 2, 0)


SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({}, []),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, []),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, []),
        (SLURM, None),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "1"}, []),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "2"}, []),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "h100:2"}, []),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_a_process_takes_the_gpus_that_are_its_own(environment, devices, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "CUDA_VISIBLE", "JAX_LOCAL")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    distributed.start("", -1, -1)
    assert [given["local_device_ids"] for given in calls] == [devices]


def test_what_jax_cannot_make_out_is_told_and_nothing_found_is_not(monkeypatch):
    def initialize(**given):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="Number of processes.*accepted are --coordinator"):
        distributed.start("", -1, -1)
    monkeypatch.undo()
    distributed.start("", -1, -1)
    assert not jax.distributed.is_initialized()


def test_who_does_not_come_in_time_is_a_lost_peer(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: time.sleep(1))
    with pytest.raises(PeerError, match="localhost:8476 within 0.1 s.*--num_processes=1") as error:
        distributed.start("localhost:8476", 2, 1, timeout=0.1)
    assert error.value.exit_status == 7


START = """
import sys, time, jax
from megabyte_jax import cli, distributed
def main(coordinator, num_processes, process_id):
    since = time.monotonic()
    distributed.start(coordinator, int(num_processes), int(process_id), timeout=2)
    print(time.monotonic() - since, jax.process_count())
cli.run(main, ["COORDINATOR", "N", "ID"])
"""


def test_a_process_alone_starts_at_once_and_says_nothing(tmp_path):
    arguments = ["-c", START, "--", "", "-1", "-1"]
    (outcome,) = hosts.launch(tmp_path, 1, lambda _: arguments, 1)
    assert (outcome.status, outcome.err) == (0, "")
    seconds, count = outcome.out.split()
    assert float(seconds) < 1 and count == "1"


def test_processes_that_wait_in_vain_end_with_status_7(tmp_path):
    coordinator = f"localhost:{hosts.free_port()}"
    waiting = [(coordinator, "2", "0"), ("localhost:1", "2", "1")]
    outcomes = hosts.launch(tmp_path, 2, lambda i: ["-c", START, "--", *waiting[i]], 1)
    for outcome, (address, *_) in zip(outcomes, waiting, strict=True):
        assert outcome.status == 7 and "Traceback" not in outcome.err
        assert f"error: not all processes came to {address} within 2 s" in outcome.err


TALK = """
import json, pathlib, sys
import jax, numpy as np
from megabyte_jax import distributed, sharding
from megabyte_jax.errors import DataError, RunError, UserError

process, num_processes, port, folder = *map(int, sys.argv[1:4]), pathlib.Path(sys.argv[4])
distributed.start(f"localhost:{port}", num_processes, process)
told = {"primary": distributed.is_primary(), "devices": jax.device_count()}

def error_of(function, *arguments):
    try:
        function(*arguments)
    except RunError as error:
        return error.exit_status, str(error)

def fail(who, error):
    with distributed.together():
        if process in who:
            raise error

told["same"] = error_of(distributed.agree, "config", {"a": (1, "é"), "b": None})
told["other"] = error_of(distributed.agree, "config", {"a": 1, "b": process == 1, "c": process})
told["missing"] = error_of(distributed.agree, "data", {"x" * 99 * process: 1} if process else {})
told["fails"] = [
    error_of(fail, who, DataError("no\\nfile"))
    for who in ([], [num_processes - 1], range(num_processes))
]
told["anywhere"] = [distributed.anywhere(process == 1), distributed.anywhere(False)]
(folder / str(process)).mkdir()
told["shared"] = [error_of(distributed.require_shared, folder / p) for p in ("", str(process))]

x = np.random.default_rng(0).integers(0, 256, (24, 16), np.uint8)
told["read"], told["fetched"] = [], []
for sizes in json.loads(sys.argv[5]):
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | sizes, jax.devices())
    read = []
    batch = distributed.put_batch(
        lambda first, n: (read.append((first, n)), x[first : first + n])[1],
        x.shape, sharding.batch_sharding(mesh),
    )
    told["read"].append(read)
    told["fetched"].append(bool((distributed.fetch(batch) == x).all()))
told["left"] = [path.name for path in folder.glob(".shared-*")]
(folder / f"{process}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of four processes, with two devices each, found out about the others."""
    folder, logs = (tmp_path_factory.mktemp(name) for name in ("talk", "logs"))
    rest = ["4", str(hosts.free_port()), str(folder), json.dumps(MESHES)]
    outcomes = hosts.launch(logs, 4, lambda process: ["-c", TALK, str(process), *rest], 2)
    assert [outcome.status for outcome in outcomes] == [0] * 4, outcomes
    return [json.loads((folder / f"{process}.json").read_text()) for process in range(4)]


def test_process_0_is_the_primary_one(told):
    assert [process["primary"] for process in told] == [True, False, False, False]
    assert [process["devices"] for process in told] == [8] * 4


def test_processes_that_disagree_all_say_so_in_the_same_words(told):
    assert [process["same"] for process in told] == [None] * 4
    where = "b: False on processes 0 2 3, True on process 1"
    expected = [2, f"{where}; accepted is the same config on all processes"]
    assert [process["other"] for process in told] == [expected] * 4
    status, text = told[0]["missing"]
    assert status == 2 and "nothing on process" in text and "same data" in text
    assert all(process["missing"] == [status, text] for process in told)


def test_where_one_process_fails_all_do(told):
    expected = [None, [3, "on process 3: no\nfile"], [3, "no\nfile"]]
    assert [process["fails"] for process in told] == [expected] * 4
    assert [process["anywhere"] for process in told] == [[True, False]] * 4


def test_a_directory_that_is_not_shared_is_told(told):
    for i, process in enumerate(told):
        shared, (status, text) = process["shared"]
        assert shared is None and status == 2
        assert f"/{i}: processes 1 2 3 cannot see" in text
        assert process["left"] == []


@pytest.mark.parametrize("number", range(len(MESHES)), ids=lambda number: str(MESHES[number]))
def test_each_process_reads_only_the_rows_of_its_own_devices(number, told):
    sizes = MESHES[number]
    read = [[tuple(rows) for rows in process["read"][number]] for process in told]
    # Processes along `sequence` and `tensor` hold the same rows.
    parts = min(sizes.get("data", 1) * sizes.get("fsdp", 1), 4)
    assert all(count == 24 // parts for ((_, count),) in read)
    rows = [row for first, count in set(sum(read, [])) for row in range(first, first + count)]
    assert sorted(rows) == list(range(24))
    assert all(process["fetched"][number] for process in told)
