"""train.py with a fault at a precise place.

    python -m tests.faults.at FAULT PROCESS UPDATE [the flags of train.py]

The fault, one of FAULTS, is in the data that the process reads for the update, from 0; with
data.workers=0 that is in its main thread.
"""

import importlib.metadata
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from unittest import mock

from jax._src import compiler, distributed

from megabyte_jax.errors import DataError

ROOT = Path(__file__).parents[2]


def raises(error):
    def fault():
        raise error

    return fault


def kills(number):
    return lambda: os.kill(os.getpid(), number)


FAULTS = {
    "none": lambda: None,
    "sleep": lambda: time.sleep(600),
    "pause": lambda: time.sleep(5),
    "data": raises(DataError("record 7 is damaged")),
    "bug": raises(RuntimeError("of a program that has a bug")),
    "SIGKILL": kills(signal.SIGKILL),
    "SIGSTOP": kills(signal.SIGSTOP),
    "SIGTERM": kills(signal.SIGTERM),
    "version": lambda: None,
    "late": lambda: None,
}


def caches_everywhere() -> None:
    """Every process keeps what it compiled for the next test; JAX lets the first one alone."""
    write = compiler._cache_write

    def as_the_first(*args):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*args)

    compiler._cache_write = as_the_first


def main() -> None:
    fault, process, update, *arguments = sys.argv[1:]
    sys.argv = ["train.py", *arguments]
    mine = f"--process_id={process}" in arguments
    if mine and fault == "version":
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.0.1" if name == "flax" else version(name)

    caches_everywhere()

    from megabyte_jax import peers
    from megabyte_jax.data.windows import TrainWindows

    peers.GRACE = 3.0  # the others of a test never say anything themselves

    rows = TrainWindows.rows

    def faulty(self, step, *where):
        if mine and step == int(update):
            FAULTS[fault]()
        return rows(self, step, *where)

    TrainWindows.rows = faulty
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        if mine and fault == "late":
            time.sleep(7)


if __name__ == "__main__":
    main()
