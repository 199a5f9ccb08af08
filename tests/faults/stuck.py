"""Runs that hang, runs that only seem to, and two runs in one work directory."""

import signal
import time
from pathlib import Path

from tests.faults import driver
from tests.faults.driver import Outcome, Trainer

LIMIT = 3  # seconds, of the watchdog
REFUSE_SECONDS = 5


def hangs(scratch: Path, tries: int, seed: int) -> Outcome:
    """A data worker or an update that never ends: stacks, a line and status 8, in time."""
    lost, worst, where = [], 0.0, ""
    limits = {"watchdog.step_seconds": float(LIMIT), "watchdog.data_seconds": float(LIMIT)}
    for i in range(tries):
        site = ("data", "update")[i % 2]
        with Trainer(driver.tiny(**limits), scratch / f"{i}", f"{site}:{9 + i}:sleep=600") as life:
            status = life.end(60)
            last = max(at for at, line in life.lines if line.startswith(("step ", "update ")))
            seconds = time.monotonic() - last
        worst, where = max((worst, where), (seconds, site))
        named = {"data": f"batch {8 + i} ", "update": f"update {9 + i} "}[site]
        complete = "most recent call first" in life.said and f"error: {named}" in life.said
        complete |= "most recent call first" in life.said and f"for {named}" in life.said
        if status != 8 or not complete or seconds > LIMIT + 3:
            lost.append(f"{site}: status {status}, {seconds:.1f} s: {life.said[-1000:]}")
    return Outcome(lost, worst, f"{where}, of which it may take {LIMIT} s")


def seems_to_hang(scratch: Path, tries: int, seed: int) -> Outcome:
    """A slow save, a long evaluation, a machine that sleeps: all longer than an update may take."""
    limits = {"watchdog.step_seconds": 2.0, "watchdog.data_seconds": 2.0}
    config, lost = driver.tiny(**limits), []
    for i in range(tries):
        fault = ("", "save:2:sleep=4", "evaluation:1:sleep=4")[i % 3]
        with Trainer(config, scratch / f"{i}", fault or "data:0:sleep=0.02") as life:
            if not fault:
                life.wait_for("^step 10/")
                life.send(signal.SIGSTOP)
                time.sleep(5)
                life.send(signal.SIGCONT)
            status = life.end()
        problems = (
            [f"status {status}"] if status else driver.differences(scratch / f"{i}", driver.tiny())
        )
        lost += [f"{fault or 'SIGSTOP'}: {problem}: {life.said[-500:]}" for problem in problems[:1]]
    return Outcome(lost)


def two_trainers(scratch: Path, tries: int, seed: int) -> Outcome:
    """The second is refused, named who the first is, and the first goes on as if alone."""
    config, lost, worst = driver.tiny(), [], 0.0
    for i in range(tries):
        workdir = scratch / f"{i}"
        with Trainer(config, workdir, "data:0:sleep=0.1") as first:
            first.wait_for("compiling the update")
            begun = time.monotonic()
            with Trainer(config, workdir) as second:
                status = second.end(60)
            seconds = time.monotonic() - begun
            worst = max(worst, seconds)
            named = f"process {first.process.pid} " in second.said
            ended = first.end()
        problems = driver.differences(workdir, config) if ended == 0 else [first.said[-500:]]
        if status != 9 or not named or problems or seconds > REFUSE_SECONDS:
            lost.append(f"status {status}, {seconds:.1f} s, {problems}: {second.said[-500:]}")
    return Outcome(lost, worst, "until it was refused")
