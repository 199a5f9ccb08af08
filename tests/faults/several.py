"""Faults of one of several processes, and what becomes of the others."""

import random
import re
import signal
import subprocess
import time
from pathlib import Path

from tests import hosts, runs
from tests.faults import driver
from tests.faults.driver import Outcome

PEER_SECONDS = 5
TEXT = b"A dog and a cat met a horse.\n" * 200


def config_of(source, num_processes, **changes):
    """Many short updates, one device for each process."""
    config = runs.tiny_config(source)
    config.train.update(num_steps=100_000, batch_size=4, grad_accumulation=1)
    config.eval.interval = config.checkpoint.interval = config.guard.replica_interval = 0
    config.data.workers = config.sample.num_bytes = 0
    config.mesh.data = num_processes
    config.watchdog.peer_seconds = float(PEER_SECONDS)
    config.optimizer.schedule = "constant"  # one program, however many updates
    config.model.global_model.dropout = config.model.local_model.dropout = 0.0
    config.update_from_flattened_dict(changes)
    return config


def _arguments(config, workdir, fault="none", process=0, update=0):
    """Of each process of train.py, by its number, when one has a fault of `tests.faults.at`."""
    port = hosts.free_port()
    _, *arguments = hosts.train_arguments(config, workdir)
    at = ["-m", "tests.faults.at", fault, str(process), str(update), *arguments]
    return lambda i: [*at, *hosts.flags(i, config.mesh.data, port)]


def launch(scratch, source, fault, process, update=3, **changes):
    """What becomes of each of two processes of train.py when one has a fault."""
    return hosts.launch(
        scratch / "logs",
        2,
        _arguments(config_of(source, 2, **changes), scratch / "run", fault, process, update),
        1,
        grace=40,
        stopped=process if fault == "SIGSTOP" else None,
        **driver.ENVIRONMENT,
    )


def signalled(
    scratch: Path,
    number: signal.Signals,
    process: int,
    num_processes: int,
    wait_for: str,
    at: float,
) -> tuple[list[int | None], list[str], float]:
    """Statuses, what was said and the seconds to the end, of a signal `at` seconds after a line."""
    source = scratch / "text"
    _write_text(source)
    arguments = _arguments(config_of(source, num_processes), scratch / "run")
    logs = scratch / "logs"
    with hosts.started(logs, num_processes, arguments, 1, **driver.ENVIRONMENT) as processes:
        deadline = time.monotonic() + 120
        while wait_for not in (logs / "0.err").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(at)
        processes[process].send_signal(number)
        begun = time.monotonic()
        stopped = processes[process] if number == signal.SIGSTOP else None
        for child in processes:
            if child is not stopped:
                _end(child, begun + 60)
        seconds = time.monotonic() - begun
        statuses = [child.poll() for child in processes]
    return statuses, [(logs / f"{i}.err").read_text() for i in range(num_processes)], seconds


def _write_text(source: Path) -> None:
    source.mkdir(parents=True)
    for i in range(8):
        (source / f"{i}.txt").write_bytes(TEXT)


def _end(child: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        child.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        pass


def lost_processes(scratch: Path, tries: int, seed: int) -> Outcome:
    """A worker or the coordinator, killed or stopped: the others end with 7 and name it."""
    draw, lost, worst, where = random.Random(seed), [], 0.0, ""
    for i in range(tries):
        number, victim = (signal.SIGKILL, signal.SIGSTOP)[i % 2], i // 2 % 2
        line = draw.choice(["compiling the update", "step 5/", "step 50/"])
        what = f"{number.name} of process {victim}"
        statuses, said, seconds = signalled(
            scratch / f"{i}", number, victim, 2, line, draw.random()
        )
        if seconds > worst:
            worst, where = seconds, what
        if statuses[1 - victim] != 7 or f": process {victim} on " not in said[1 - victim].replace(
            "no sign of life of ", ""
        ):
            lost.append(f"{what}: statuses {statuses}: {said[1 - victim][-500:]}")
    return Outcome(lost, worst, f"{where}, of {PEER_SECONDS} s")


def restarted(scratch: Path, tries: int, seed: int) -> Outcome:
    """A worker or the coordinator, killed; started again, the run is one that none was lost of."""
    draw, lost = random.Random(seed), []
    source, whole = scratch / "text", scratch / "whole"
    _write_text(source)
    changes = {"train.num_steps": 30, "checkpoint.interval": 5, "eval.interval": 10}
    changes["optimizer.schedule"] = "linear"  # which has to be found again where it was
    for outcome in launch(whole, source, "none", 0, **changes):
        assert outcome.status == 0, outcome.err
    for i in range(tries):
        directory, update = scratch / f"{i}", draw.randrange(11, 29)
        what = f"process {i % 2} killed at update {update}"
        killed = launch(directory, source, "SIGKILL", i % 2, update=update, **changes)
        again = launch(directory, source, "none", 0, **changes)
        statuses = [outcome.status for outcome in (killed[1 - i % 2], *again)]
        start = re.search(driver.STARTED, again[0].err)
        saved = max(map(int, re.findall(driver.SAVED, killed[0].err)), default=0)
        # A save begins after the one before it has ended, so that of update 5 is there.
        if statuses != [7, 0, 0] or not start or int(start[1]) < max(saved, 5):
            lost.append(f"{what}: statuses {statuses}: {again[0].err[-500:]}")
        else:
            found = driver.differences_of(directory / "run", whole / "run")
            lost += [f"{what}: {difference}" for difference in found[:1]]
    return Outcome(lost)


def preempted(scratch: Path, tries: int, seed: int) -> Outcome:
    """A signal to one of two or four: all save the same update and end with 143."""
    draw, lost, worst, where = random.Random(seed), [], 0.0, ""
    for i in range(tries):
        num_processes = 4 if i % 5 == 4 else 2
        one = draw.randrange(num_processes)
        line = draw.choice(["compiling the initial", "compiling the update", "step 5/", "step 50/"])
        what = f"process {one} of {num_processes} after {line!r}"
        statuses, said, seconds = signalled(
            scratch / f"{i}", signal.SIGTERM, one, num_processes, line, 2 * draw.random()
        )
        if seconds > worst:
            worst, where = seconds, what
        ends = [re.findall(r"preempted by [\w ]+: (.*)", text) for text in said]
        saved = runs.saved_steps(scratch / f"{i}" / "run")
        # A signal before the first update leaves nothing to save.
        expected = f"update {saved[0]} is saved" if saved else "there is nothing new"
        if statuses != [143] * num_processes or ends != [ends[0]] * num_processes:
            lost.append(f"{what}: statuses {statuses}, said {ends}: {said[one][-500:]}")
        elif len(saved) > 1 or not ends[0][0].startswith(expected):
            lost.append(f"{what}: {saved} is saved, said {ends[0]}")
    return Outcome(lost, worst, where)
