"""Several real processes on this machine, each with a few simulated devices."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import base
from megabyte_jax import run_config
from tests import runs, xla

Arguments = Callable[[int], Sequence[str]]


class Outcome(NamedTuple):
    status: int  # -9 of a process that was not done in time
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags(process: int, num_processes: int, port: int) -> list[str]:
    joined = [f"--num_processes={num_processes}", f"--process_id={process}"]
    return [f"--coordinator=localhost:{port}", *joined]


def train_arguments(config: ConfigDict, workdir: Path) -> list[str]:
    """Of train.py in each process."""
    before = run_config.flatten(base.get_config())
    changed = [
        f"--config.{key}={value}"
        for key, value in run_config.flatten(config).items()
        if value != before[key]
    ]
    return ["train.py", f"--config={runs.ROOT}/configs/base.py", f"--workdir={workdir}", *changed]


@contextlib.contextmanager
def started(
    logs: Path, num_processes: int, arguments: Arguments, devices: int, **environment: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Python on the arguments of each process; all are killed at the end of the block.

    `%p` in a value of the environment is the number of the process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    processes = []
    try:
        for process in range(num_processes):
            own = {name: value.replace("%p", str(process)) for name, value in environment.items()}
            with open(logs / f"{process}.out", "w") as out, open(logs / f"{process}.err", "w") as e:
                command = [sys.executable, *arguments(process)]
                environ = {**inherited, "XLA_FLAGS": xla.flags(devices), **own}
                processes.append(
                    subprocess.Popen(command, env=environ, cwd=runs.ROOT, stdout=out, stderr=e)
                )
        yield processes
    finally:
        for child in processes:
            child.kill()
        for child in processes:
            child.wait()


def launch(
    logs: Path,
    num_processes: int,
    arguments: Arguments,
    devices: int,
    timeout: float = 120,
    grace: float = 10,
    stopped: int | None = None,
    **environment: str,
) -> list[Outcome]:
    """What becomes of each process; when one fails, the others have `grace` seconds more.

    One that is `stopped` is not waited for.
    """
    deadline = time.monotonic() + timeout
    with started(logs, num_processes, arguments, devices, **environment) as processes:
        failed = False
        waited = [child for i, child in enumerate(processes) if i != stopped]
        while None in [child.poll() for child in waited] and time.monotonic() < deadline:
            if not failed and any(child.returncode for child in processes):
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            time.sleep(0.05)
    return [
        Outcome(child.returncode, *((logs / f"{i}.{s}").read_text() for s in ("out", "err")))
        for i, child in enumerate(processes)
    ]
