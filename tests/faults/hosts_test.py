"""What becomes of the other processes when something happens to one of them."""

import re
import socket

import pytest

from tests import runs
from tests.faults.several import launch

RESUMES = "; started again, the run goes on from its last checkpoint"


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


def name(process):
    return f"process {process} on {socket.gethostname()}"


def last_line(outcome):
    return outcome.err.splitlines()[-1]


@pytest.mark.parametrize("fault, lost", [("SIGKILL", 1), ("SIGKILL", 0)])
def test_a_lost_process_ends_the_other_which_says_who_it_was(fault, lost, text_dir, tmp_path):
    outcomes = launch(tmp_path, text_dir, fault, lost)
    assert (outcomes[lost].status, outcomes[1 - lost].status) == (-9, 7), outcomes
    reason = f"no sign of life of {name(lost)} for 5 s|{name(lost)} is gone"
    assert re.fullmatch(f"train.py: error: ({reason}){RESUMES}", last_line(outcomes[1 - lost]))
    assert "Traceback" not in outcomes[1 - lost].err


@pytest.mark.parametrize("fault, status", [("data", 3), ("bug", 1)])
def test_what_one_process_cannot_go_on_with_ends_all(fault, status, text_dir, tmp_path):
    outcomes = launch(tmp_path, text_dir, fault, 1)
    assert statuses(outcomes) == [status] * 2, outcomes
    text = {"data": "record 7 is damaged", "bug": "of a program that has a bug"}[fault]
    assert last_line(outcomes[0]) == f"train.py: error: on {name(1)}: {text}"
    assert "Traceback" not in outcomes[0].err and text in last_line(outcomes[1])


def test_a_process_that_hangs_ends_all_with_their_stacks(text_dir, tmp_path):
    limits = {"watchdog.step_seconds": 5.0, "watchdog.data_seconds": 5.0}
    outcomes = launch(tmp_path, text_dir, "sleep", 1, **limits, **{"watchdog.peer_seconds": 60.0})
    assert statuses(outcomes) == [8, 8], outcomes
    for outcome in outcomes:
        assert 'train.py", line ' in outcome.err and "Thread 0x" in outcome.err
    assert 'at.py", line ' in outcomes[1].err.split("most recent call first")[-1]


def test_a_process_that_comes_to_its_end_later_is_waited_for(text_dir, tmp_path):
    outcomes = launch(tmp_path, text_dir, "late", 0, **{"train.num_steps": 4})
    assert statuses(outcomes) == [0, 0], outcomes


def test_a_pause_that_is_shorter_than_the_limit_loses_nobody(text_dir, tmp_path):
    changes = {"train.num_steps": 6, "watchdog.peer_seconds": 12.0}
    assert statuses(launch(tmp_path, text_dir, "pause", 1, **changes)) == [0, 0]


def test_other_versions_are_told_before_anything_starts(text_dir, tmp_path):
    outcomes = launch(tmp_path, text_dir, "version", 1)
    assert statuses(outcomes) == [2, 2], outcomes
    assert outcomes[0].err == outcomes[1].err
    assert re.fullmatch(
        "train.py: error: flax: '.*' on process 0, '0.0.1' on process 1; "
        "accepted is the same version on all processes\n",
        outcomes[0].err,
    )
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_process_saves_the_same_update_on_all(text_dir, tmp_path):
    outcomes = launch(tmp_path, text_dir, "SIGTERM", 0, update=5)
    assert statuses(outcomes) == [143] * 2, outcomes
    said = [re.findall(r"preempted by .*: update (\d+) is saved", o.err) for o in outcomes]
    (step,) = said[0]
    assert said == [[step]] * 2 and runs.saved_steps(tmp_path / "run") == [int(step)]
