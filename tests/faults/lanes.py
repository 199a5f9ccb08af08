"""The table of lanes: a fault, what is tried and how often."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.faults import damage, fuzz, guards, kills, preemption, several, storage, stuck
from tests.faults.driver import Outcome


class Lane(NamedTuple):
    """A fault.

    Attributes:
        name: of the fault.
        run: makes `tries` in an empty directory, at moments drawn from a seed.
        fast: tries in `make test`; 0 for none.
        full: tries in `make faults`.
        share: tries in one go, where the full lane divides them over the cores.
        mounts: whether it needs file systems of its own, which root alone can make.
    """

    name: str
    run: Callable[[Path, int, int], Outcome]
    fast: int
    full: int
    share: int
    mounts: bool = False


LANES = (
    Lane("no false report of copies that differ", guards.no_false_report, 0, 10_000, 10_000),
    Lane("SIGKILL in training", kills.in_training, 4, 300, 20),
    Lane("SIGKILL in a save", kills.in_a_save, 4, 200, 20),
    Lane("SIGKILL at awkward places", kills.at_awkward_places, 8, 8, 8),
    Lane("SIGTERM, size of the quickstart", preemption.at_random_times, 1, 100, 10),
    Lane("damaged checkpoint files", damage.files, 20, 500, 250),
    Lane("checkpoint directories that are none", damage.directories, 13, 13, 13),
    Lane("full disk", storage.full, 2, 12, 3, mounts=True),
    Lane("too small, read-only or no directory", storage.unusable, 4, 4, 4, mounts=True),
    Lane("work directory removed", storage.vanishing, 0, 4, 4),
    Lane("too few open files", storage.few_files, 0, 6, 3),
    Lane("NaN at six sites", guards.not_finite, 2, 120, 12),
    Lane("skip_update and rollback_skip", guards.policies, 1, 12, 4),
    Lane("flipped bit in one of four copies", guards.flipped_bits, 4, 64, 64),
    Lane("flipped bit, noticed by train.py", guards.flipped_in_a_run, 1, 6, 6),
    Lane("hung data worker or update", stuck.hangs, 2, 6, 3),
    Lane("no false alarm of the watchdog", stuck.seems_to_hang, 1, 6, 3),
    Lane("fuzzed overrides and config files", fuzz.lane, 0, 10_000, 1_250),
    Lane("second trainer in the directory", stuck.two_trainers, 1, 6, 3),
    Lane("SIGTERM in each phase", preemption.in_each_phase, 3, 30, 5),
    Lane("SIGTERM twice, SIGINT, SIGUSR1, SIGKILL after", preemption.otherwise, 2, 24, 8),
    Lane("one of two processes killed or stopped", several.lost_processes, 0, 8, 4),
    Lane("one of two processes killed, started again", several.restarted, 0, 4, 2),
    Lane("SIGTERM to one of two or four processes", several.preempted, 0, 10, 5),
)
