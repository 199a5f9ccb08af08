"""Several processes, of one host or of many, that train or evaluate as one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from numpy.typing import NDArray

from megabyte_jax.errors import PeerError, RunError, UserError

_ALONE = "--num_processes=1 for a process by itself"


def start(coordinator: str, num_processes: int, process_id: int, timeout: float = 300) -> None:
    """Joins the processes of a run; before anything that asks JAX for its devices.

    Without any of the three flags JAX says what the process is part of: a Cloud TPU slice, a
    Kubernetes, Slurm or Open MPI job. Where that is nothing, it is a process by itself.

    Args:
        coordinator: HOST:PORT at which process 0 listens, the same for all; "" if not given.
        num_processes: of all hosts; 1 alone is a process by itself, -1 if not given.
        process_id: of this one, from 0; -1 if not given.
        timeout: seconds until all have to be there.

    Raises:
        UserError: the flags are incomplete or nonsense, or what was detected cannot be used.
        PeerError: the others are not there in time.
    """
    if coordinator or process_id != -1 or num_processes not in (-1, 1):
        _check(coordinator, num_processes, process_id)
        _join(
            timeout,
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    elif num_processes == -1:
        try:
            _join(timeout)
        except RunError:
            raise
        except Exception as error:
            # JAX has no other way to say that it found nothing, or that it is in use already, as in
            # a notebook.
            if not re.search("coordinator_address should be|must be called before", str(error)):
                raise UserError(
                    f"the job that this process seems to be part of cannot be used "
                    f"({type(error).__name__}: {error}); accepted are --coordinator, "
                    f"--num_processes and --process_id, or {_ALONE}"
                ) from error


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    address = re.fullmatch(r"(\[[\da-fA-F:.]+\]|[\w.-]+):(\d{1,5})", coordinator, re.ASCII)
    if not address or not 0 < int(address[2]) < 2**16:
        raise UserError(
            f"--coordinator={coordinator!r}: accepted is HOST:PORT of process 0, as in "
            f"10.0.0.1:8476, with --num_processes and --process_id; or {_ALONE}"
        )
    if not 0 < num_processes < 2**20:
        raise UserError(
            f"--num_processes={num_processes}: accepted is how many take part, at least 1"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: accepted is a number from 0 to {num_processes - 1}, as "
            f"--num_processes={num_processes}, another one for each process"
        )


def _join(timeout: float, **arguments: Any) -> None:
    """Calls `jax.distributed.initialize`, which ends the process itself where a peer is missing."""
    if arguments.get("process_id") == 0:
        _require_free(arguments["coordinator_address"])
    # Otherwise SIGTERM only sets a flag of JAX's, and a run that is told to stop goes on.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                local_device_ids=_local_device_ids(detected=not arguments),
                initialization_timeout=int(timeout) + 60,
                **arguments,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(min(10, timeout))
    if thread.is_alive() and timeout > 10:
        print("waiting for the other processes ...", file=sys.stderr, flush=True)
        thread.join(timeout - 10)
    if thread.is_alive():
        address = arguments.get("coordinator_address", "the coordinator that was detected")
        raise PeerError(
            f"not all processes came to {address} within {timeout:g} s; accepted are as many as "
            f"--num_processes says, that can connect to process 0; or {_ALONE}"
        )
    if failures:
        raise failures[0]


def _require_free(coordinator: str) -> None:
    """A port that is taken is a segmentation fault in JAX."""
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        # A run that was killed a moment ago does not keep its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator={coordinator}: {error.strerror}; accepted is a port that is free "
                "on the host of process 0"
            ) from None


def _local_device_ids(detected: bool) -> list[int] | None:
    """Which GPUs of its host a process takes, of those it sees.

    Where a job is detected, JAX gives each process the one GPU of its number on the host, also if
    it is the only process there or sees no other GPU.

    Returns:
        [] for all; None to leave it to JAX.
    """
    job = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in job:
        return None
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in job:
        one_per_host = job["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    else:
        one_per_host = job.get("SLURM_NTASKS") == job.get("SLURM_STEP_NUM_NODES")
    seen = job.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = job.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2]  # "2" or "h100:2"
    bound = seen != [""] and str(len(seen)) == own
    return None if detected and not one_per_host and not bound else []


def is_primary() -> bool:
    """Whether this is the process that writes what is to be written once."""
    return jax.process_index() == 0


def _alone() -> bool:
    # Before a look at the devices, which takes seconds where they are TPUs.
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def _gather(text: str) -> list[str]:
    """What each process says, by process."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = " ".join(str(counts[index]) for index in sorted(counts))
        raise UserError(f"devices of the processes: {each}; accepted is the same number of each")
    data = np.frombuffer(text.encode(), np.uint8)
    heads = multihost_utils.process_allgather(np.array([jax.process_index(), data.size]))
    # A power of two, so that few sizes are compiled.
    room = np.zeros(1 << int(heads[:, 1].max()).bit_length(), np.uint8)
    room[: data.size] = data
    rows = multihost_utils.process_allgather(room)
    return [bytes(rows[row, : heads[row, 1]]).decode() for row in heads[:, 0].argsort()]


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Compares values with those of the other processes; all of them call this.

    Args:
        what: they are, for the error.
        values: by name, of what JSON can hold.

    Raises:
        UserError: they are not the same everywhere; every process raises the same error, which
            names the first that differs.
    """
    if _alone():
        return
    told = [json.loads(text) for text in _gather(json.dumps(dict(values)))]
    for name in sorted(set().union(*told)):
        processes: dict[str, list[int]] = {}
        for process, theirs in enumerate(told):
            value = repr(theirs[name]) if name in theirs else "nothing"
            processes.setdefault(value, []).append(process)
        if len(processes) > 1:
            each = ", ".join(f"{value} on {_listed(who)}" for value, who in processes.items())
            raise UserError(f"{name}: {each}; accepted is the same {what} on all processes")


def _listed(processes: Sequence[int]) -> str:
    if len(processes) == 1:
        return f"process {processes[0]}"
    shown = " ".join(map(str, processes[:8]))
    more = len(processes) - 8
    return f"processes {shown}" + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What a process cannot go on with inside, none can: all of them raise it.

    Nothing inside may wait for other processes. At the end of it they wait for each other.

    Raises:
        RunError: with the exit status of the first process that failed.
    """
    error = None
    try:
        yield
    except RunError as failure:
        error = failure
    if _alone():
        if error:
            raise error
        return
    told = _gather(json.dumps([error.exit_status, str(error)] if error else None))
    failed = [process for process, failure in enumerate(told) if failure != "null"]
    if not failed:
        return
    status, text = json.loads(told[failed[0]])
    same = told.count(told[failed[0]]) == len(told)
    first = RunError(text if same else f"on process {failed[0]}: {text}")
    first.exit_status = status
    raise first from error


def anywhere(flag: bool) -> bool:
    """Whether something is so on any process; all of them call this."""
    if _alone():
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def require_shared(directory: Path) -> None:
    """Checks that all processes see one directory; all of them call this.

    Args:
        directory: that is there on process 0.

    Raises:
        UserError: a process does not see what process 0 writes there.
    """
    if _alone():
        return
    name = f".shared-{secrets.token_hex(8)}"
    if is_primary():
        (directory / name).touch()
    name = _gather(name)[0]
    seen = _gather(str((directory / name).exists()))
    if is_primary():
        (directory / name).unlink()
    blind = [process for process, answer in enumerate(seen) if answer != "True"]
    if blind:
        raise UserError(
            f"--workdir={directory}: {_listed(blind)} cannot see what process 0 writes there; "
            "accepted is a directory that all hosts share"
        )


def put_batch(
    read: Callable[[int, int], NDArray[Any]], shape: tuple[int, int], sharding: Sharding
) -> jax.Array:
    """Makes a batch over the devices of all processes of the rows that each reads for its own.

    Args:
        read: of the number of the first row and how many, to these rows, [rows, T]; called once
            for all that follow each other, and safe to call in a thread.
        shape: B, T of the whole batch.
        sharding: where it lies. Processes may hold the same rows, or other columns of them.

    Returns:
        The batch, [B, T].
    """
    runs: list[list[int]] = []
    places: Any = sharding.addressable_devices_indices_map(shape).values()
    for first, stop in sorted({index[0].indices(shape[0])[:2] for index in places}):
        if runs and first <= runs[-1][1]:
            runs[-1][1] = stop
        else:
            runs.append([first, stop])
    rows = {first: read(first, stop - first) for first, stop in runs}

    def block(index: Any) -> NDArray[Any]:
        start, stop, _ = index[0].indices(shape[0])
        first = max(first for first in rows if first <= start)
        return rows[first][start - first : stop - first, index[1]]

    return jax.make_array_from_callback(shape, sharding, block)


def fetch(x: jax.Array) -> NDArray[Any]:
    """Brings an array to the host, whole; all processes call this.

    Args:
        x: over the devices of all processes, or of this one alone.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
