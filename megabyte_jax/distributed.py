"""Several processes, of one host or of many, that train or evaluate as one."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state as _jax_state
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from numpy.typing import NDArray

from megabyte_jax.errors import RunError, UserError
from megabyte_jax.joining import join
from megabyte_jax.peers import FOREVER, ROOT, Peers

_gathered = itertools.count()


_peers: Peers | None = None


def start(
    coordinator: str,
    num_processes: int,
    process_id: int,
    timeout: float = 300,
    peer_seconds: float = 60,
) -> None:
    """Joins the processes of a run; before anything that asks JAX for its devices.

    Without any of the three flags JAX says what the process is part of: a Cloud TPU slice, a
    Kubernetes, Slurm or Open MPI job. Where that is nothing, it is a process by itself.

    From then on a process that is lost or fails ends the others, from a thread; docs/reliability.md
    says how.

    Args:
        coordinator: HOST:PORT at which process 0 listens, the same for all; "" if not given.
        num_processes: of all hosts; 1 alone is a process by itself, -1 if not given.
        process_id: of this one, from 0; -1 if not given.
        timeout: seconds until all have to be there.
        peer_seconds: without a sign of life of a process until it is lost; 0 for never.

    Raises:
        UserError: the flags are incomplete or nonsense, what was detected cannot be used, or the
            processes do not run the same code on as many devices each.
        PeerError: the others are not there in time.
    """
    join(coordinator, num_processes, process_id, timeout, peer_seconds)
    if _jax_state.client is not None and _jax_state.num_processes > 1:
        _meet(_jax_state.client, timeout, peer_seconds)


def _meet(client: Any, timeout: float, peer_seconds: float) -> None:
    global _peers
    process = _jax_state.process_id
    hello = json.dumps([socket.gethostname(), _versions()])
    told = [json.loads(text) for text in _exchange(client, "hello", process, hello, timeout)]
    hosts = [host for host, _ in told]
    _peers = Peers(client, _jax_state.coordinator_address or "", process, hosts, peer_seconds)
    _peers.start()
    _require_same("version", [versions for _, versions in told])
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        each = " ".join(str(devices[index]) for index in sorted(devices))
        raise UserError(f"devices of the processes: {each}; accepted is the same number of each")


def _versions() -> dict[str, str]:
    """Of what has to be the same everywhere, by name."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        contents = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(contents)} ".encode() + contents)
    code = {"source of megabyte_jax (its digest)": digest.hexdigest()[:16]}
    return {name: importlib.metadata.version(name) for name in names} | code


def _exchange(
    client: Any, name: str, process: int, text: str, timeout: float = FOREVER / 1000
) -> list[str]:
    """What each process says, by process, through the store of the coordinator.

    Args:
        client: of JAX's.
        name: of this exchange, of which there is one.
        process: number of this one.
        text: that it says.
        timeout: seconds until all have to be there.
    """
    client.key_value_set(f"{ROOT}/{name}/{process}", text)
    client.wait_at_barrier(f"{ROOT}/{name}", int(timeout * 1000))
    said = client.key_value_dir_get(f"{ROOT}/{name}/")
    return [text for _, text in sorted((int(key.rpartition("/")[2]), text) for key, text in said)]


def is_primary() -> bool:
    """Whether this is the process that writes what is to be written once."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this process is all of the run."""
    # Before a look at the devices, which takes seconds where they are TPUs.
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def _gather(text: str) -> list[str]:
    """What each process says, by process; all of them call this."""
    name = f"gather/{next(_gathered)}"
    return _exchange(_jax_state.client, name, jax.process_index(), text)


def gather(value: Any) -> list[Any]:
    """What each process has, by process; all of them call this.

    Args:
        value: of what JSON can hold.
    """
    return [value] if is_alone() else [json.loads(text) for text in _gather(json.dumps(value))]


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Compares values with those of the other processes; all of them call this.

    Args:
        what: they are, for the error.
        values: by name, of what JSON can hold.

    Raises:
        UserError: they are not the same everywhere; every process raises the same error, which
            names the first that differs.
    """
    if is_alone():
        return
    _require_same(what, [json.loads(text) for text in _gather(json.dumps(dict(values)))])


def _require_same(what: str, told: Sequence[Mapping[str, Any]]) -> None:
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
    if is_alone():
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
    if is_alone():
        return flag
    return "True" in _gather(str(bool(flag)))


def preempted_together(requested: bool) -> bool:
    """Whether all processes stop here; all of them call this, once after each update.

    Args:
        requested: whether this process is to stop. It waits for a second or two until all know;
            otherwise this takes microseconds.

    Returns:
        The same on all processes: true from some call on after one of them was requested.
    """
    return _peers.stop_together(requested) if _peers else requested


def tell(status: int, error: BaseException | str) -> None:
    """Tells the other processes that this one ends with an error, as none can go on without it.

    They end with the same status, unless they do so by themselves in a few seconds.

    Args:
        status: with which this process exits.
        error: why.
    """
    if _peers:
        _peers.tell(status, error)


def leave() -> None:
    """Waits for the other processes to come to their end as well; before `os._exit`."""
    if _peers:
        _peers.leave()
        jax.distributed.shutdown()


def require_shared(directory: Path) -> None:
    """Checks that all processes see one directory; all of them call this.

    Args:
        directory: that is there on process 0.

    Raises:
        UserError: a process does not see what process 0 writes there.
    """
    if is_alone():
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
