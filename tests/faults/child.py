"""Runs train.py in this process with something broken: child.py "FAULT ..." FLAGS OF TRAIN.PY.

A fault is SITE:N:WHAT, which befalls the N-th call (from 1) of a function, nofile:N, so many open
files at most, or the name of one of the bugs in bugs.py. The package itself knows of none of them.
"""

import errno
import functools
import os
import resource
import runpy
import signal
import sys
import time
from typing import Any

import jax

from megabyte_jax import checkpoint, evaluation
from megabyte_jax.data import windows
from tests.faults import bugs, values
from tests.runs import ROOT

SITES: dict[str, tuple[Any, str]] = {
    "restore": (checkpoint.Checkpoints, "restore"),
    "compile": (jax.stages.Lowered, "compile"),
    "data": (windows.TrainWindows, "rows"),
    "update": (jax.stages.Compiled, "__call__"),
    "evaluation": (evaluation, "evaluate"),
    "save": (checkpoint.Checkpoints, "save"),
}


def strike(what: str) -> None:
    """Does WHAT: a signal, sleep=SECONDS or an error of the operating system, by its name."""
    if what.startswith("sleep="):
        time.sleep(float(what.removeprefix("sleep=")))
    elif what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    else:
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))


def inject(site: str, at: int, what: str) -> None:
    """Breaks the `at`-th call of a site, from 1; every call if `at` is 0."""
    owner, name = SITES[site]
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        # Other things are compiled too, but only an update takes a state and a batch.
        if site != "update" or len(args) == 3:
            calls += 1
            if at in (0, calls):
                strike(what)
        return original(*args, **kwargs)

    setattr(owner, name, broken)


def main() -> None:
    faults, sys.argv = sys.argv[1], ["train.py", *sys.argv[2:]]
    for fault in faults.split():
        site, *rest = fault.split(":")
        if site == "nofile":
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(rest[0]),) * 2)
        elif site in bugs.BUGS:
            bugs.BUGS[site].apply()
        elif site in values.SITES:
            values.inject(site, *map(int, rest))
        else:
            inject(site, int(rest[0]), rest[1])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
