"""All tries of every lane: python -m tests.faults.full [--output=FILE] [PART OF A NAME ...].

Prints the table `fault, tries, survived, lost`, and exits with 1 if anything was lost.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine
from tests import conftest  # noqa: F401  # says how JAX is to run, before it is imported
from tests.faults.driver import SHARED, Outcome
from tests.faults.lanes import LANES, Lane
from tests.faults.storage import can_mount


def hold_to_a_core(cores: "multiprocessing.Queue[int]") -> None:
    """A worker and all that it starts have one core, as the results depend on their number.

    Args:
        cores: with one for each worker.
    """
    os.sched_setaffinity(0, {cores.get()})


def run(number: int, tries: int, seed: int) -> Outcome:
    """Some tries of a lane, in a worker."""
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        try:
            return LANES[number].run(Path(scratch), tries, seed)
        except Exception:  # the other lanes go on
            return Outcome([traceback.format_exc()] * tries)


def row(lane: Lane, outcomes: list[Outcome]) -> dict[str, Any]:
    """The line of a lane in the table."""
    lost = [problem for outcome in outcomes for problem in outcome.lost]
    worst = max(outcomes, key=lambda outcome: outcome.worst)
    return {
        "fault": lane.name,
        "tries": lane.full,
        "survived": lane.full - len(lost),
        "lost": len(lost),
        "worst_seconds": round(worst.worst, 2),
        "worst_where": worst.where,
        "problems": lost[:3],
    }


def chosen(parts: list[str]) -> list[int]:
    """Numbers of the lanes whose names have one of the parts, and that this machine can run."""
    numbers = []
    for number, lane in enumerate(LANES):
        if any(part in lane.name for part in parts or [""]):
            if lane.mounts and not can_mount(Path(SHARED.name)):
                print(f"{lane.name}: left out, as only root can make a file system to fill")
            else:
                numbers.append(number)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    parser.add_argument("lanes", nargs="*", help="those whose names contain one of these")
    options = parser.parse_args()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    part = shlex.join(["python", "-m", "tests.faults.full", *options.lanes])
    command = part if options.lanes else "make faults"
    begun, rows = time.monotonic(), []
    spawn = multiprocessing.get_context("spawn")
    cores, number_of_cores = spawn.Queue(), len(os.sched_getaffinity(0))
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with ProcessPoolExecutor(number_of_cores, spawn, hold_to_a_core, (cores,)) as pool:
        jobs = {
            number: [
                # A lane by itself has the tries that it has among all.
                pool.submit(run, number, min(lane.share, lane.full - done), 10**5 * number + done)
                for done in range(0, lane.full, lane.share)
            ]
            for number in chosen(options.lanes)
            for lane in [LANES[number]]
        }
        print(f"{'fault':44} {'tries':>6} {'survived':>8} {'lost':>5}  worst")
        for number, futures in jobs.items():
            made = row(LANES[number], [future.result() for future in futures])
            rows.append(made)
            timed = f"{made['worst_seconds']} s {made['worst_where']}"
            print(
                f"{made['fault']:44} {made['tries']:6} {made['survived']:8} {made['lost']:5}  "
                f"{timed if made['worst_seconds'] else ''}",
                flush=True,
            )
            for problem in made["problems"]:
                print(f"  {problem}", file=sys.stderr, flush=True)
            seconds = round(time.monotonic() - begun)
            if options.output:  # as far as it is: the rest takes most of an hour
                where = machine.description(command)
                table = {**where, "seconds": seconds, "rows": rows}
                options.output.write_text(json.dumps(table, indent=2) + "\n")
    print(f"{seconds} s")
    sys.exit(any(made["lost"] for made in rows))


if __name__ == "__main__":
    main()
