"""How a process joins the others of a run."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from typing import Any

import jax

from megabyte_jax.errors import PeerError, RunError, UserError

_ALONE = "--num_processes=1 for a process by itself"


def join(
    coordinator: str, num_processes: int, process_id: int, timeout: float, peer_seconds: float
) -> None:
    """Joins the processes of a run; arguments and errors are those of `distributed.start`."""
    if coordinator or process_id != -1 or num_processes not in (-1, 1):
        _check(coordinator, num_processes, process_id)
        _join(
            timeout,
            peer_seconds,
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    elif num_processes == -1:
        try:
            _join(timeout, peer_seconds)
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


def _join(timeout: float, peer_seconds: float, **arguments: Any) -> None:
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
                # JAX aborts without a word of who is lost, so it is to notice later.
                heartbeat_timeout_seconds=int(3 * peer_seconds) + 60 if peer_seconds else 10**7,
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
