"""SIGKILL: whatever moment it comes at, the run that goes on afterwards is the same run."""

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from tests.faults import driver
from tests.faults.driver import Outcome, Trainer

# A fault as child.py takes it, and what kills the life: False if that ended before.
Strike = tuple[str, Callable[[Trainer], bool]]


def chain(
    scratch: Path, config: ConfigDict, strikes: Iterable[Strike], devices: int = 1
) -> Outcome:
    """Runs whose lives are ended one after another, until the run is done and no strike is left.

    When a run differs from the one that nothing interrupted, all its strikes count as lost.

    Args:
        scratch: an empty directory.
        config: of the runs.
        strikes: one for each life, the last one first; each is made once. What they find wrong
            they raise as an AssertionError.
        devices: that are simulated.
    """
    lost, left = [], list(strikes)
    while left:
        workdir, before = Path(tempfile.mkdtemp(dir=scratch)), len(left)
        problems = _one_run(config, workdir, left, devices)
        problems = problems or driver.differences(workdir, config, devices)
        if problems and len(left) == before:
            left.pop()
        lost += problems[:1] * (before - len(left))
    return Outcome(lost)


def _one_run(config: ConfigDict, workdir: Path, left: list[Strike], devices: int) -> list[str]:
    """Lives of a run until it is done; takes the strikes that hit from the end of `left`."""
    saved = 0
    while True:
        fault, strike = left[-1] if left else ("", Trainer.kill)
        with Trainer(config, workdir, fault, devices) as life:
            try:
                hit = bool(left) and strike(life)
            except AssertionError as error:
                return [str(error)]
            status = life.end()
            if life.orphans():
                return [f"processes {life.orphans()} live on"]
            if -1 < life.started_at() < saved:
                return [f"update {saved} was saved, {life.started_at()} came back"]
            saved = max(saved, life.announced())
            if not hit:
                return [f"status {status}: {life.said[-1000:]}"] if status else []
            left.pop()


def _lasting(lives: int) -> ConfigDict:
    """A run that goes on for many lives, as each run costs its last one, which is not killed."""
    return driver.tiny(**{"train.num_steps": max(60, 20 * (lives - 1))})


def in_training(scratch: Path, tries: int, seed: int) -> Outcome:
    """Random moments, one in five from the start of the process on, the others in the updates."""
    moments = random.Random(seed)

    def strike(life: Trainer) -> bool:
        if moments.random() < 0.8:
            life.wait_for("^step ")
        time.sleep(moments.uniform(0, 2))
        return life.kill()

    return chain(scratch, _lasting(tries), itertools.repeat(("", strike), tries))


def in_a_save(scratch: Path, tries: int, seed: int) -> Outcome:
    """Random moments between the first file of a save and the line that announces it."""
    moments = random.Random(seed)

    def strike(life: Trainer) -> bool:
        folder, number = life.workdir / "checkpoints", moments.randint(1, 3)
        seen: set[str] = set()
        while len(seen) < number and life.process.poll() is None:
            # What Orbax writes has another name than a step until it is committed.
            seen |= {path.name for path in folder.glob("*") if not path.name.isdigit()}
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.12))
        return life.kill()

    return chain(scratch, _lasting(tries), itertools.repeat(("", strike), tries))


def at_awkward_places(scratch: Path, tries: int, seed: int) -> Outcome:
    """The corners of a run, one life each; `tries` has to be their number."""

    def dies(life: Trainer) -> bool:
        return life.end() == -9

    def at(pattern: str) -> Strike:
        return "", lambda life: life.wait_for(pattern) and life.kill()

    strikes = [
        ("compile:1:SIGKILL", dies),  # which is that of the initial state or of the update
        ("update:1:SIGKILL", dies),
        ("update:6:SIGKILL", dies),  # before the first save
        ("save:1:SIGKILL", dies),
        ("evaluation:1:SIGKILL", dies),
        ("restore:1:SIGKILL", dies),
        at("^step 60/60"),
        ("", lambda life: life.end() == 0),  # after the last save
    ]
    assert tries == len(strikes)
    return chain(scratch, driver.tiny(), reversed(strikes))
