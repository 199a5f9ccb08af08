import os
import signal
import subprocess
import sys
import time

import pytest

from megabyte_jax import watchdog
from tests import runs

HANG = """
import threading, time
from megabyte_jax.watchdog import Watchdog
def reads_for_ever():
    time.sleep(60)
threading.Thread(target=reads_for_ever, daemon=True).start()
with Watchdog() as dog:
    dog.begin("update 7", 60)
    with dog.during("waiting for batch 8", 1):
        print("hangs", flush=True)
        time.sleep(60)
"""


def test_what_hangs_is_named_with_all_stacks_and_a_status_of_its_own():
    start = time.monotonic()
    command = [sys.executable, "-c", HANG]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == watchdog.EXIT_STATUS == 8 and time.monotonic() - start < 20
    assert "reads_for_ever" in done.stderr and "<module>" in done.stderr
    assert "waiting for batch 8 has taken" in done.stderr.splitlines()[-1]


def test_a_process_that_was_stopped_for_a_while_does_not_hang():
    script = HANG.replace(", 1)", ", 3)").replace("time.sleep(60)\n", "time.sleep(1.5)\n")
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"hangs\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(30) == 0


@pytest.fixture
def ends(monkeypatch):
    found = []
    monkeypatch.setattr(watchdog, "_TICK", 0.01)
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self, text: found.append(text))
    return found


def test_each_thing_has_a_time_of_its_own_and_none_is_for_ever(ends):
    with watchdog.Watchdog() as dog:
        dog.begin("an update", 5)
        for _ in range(4):
            with dog.during("a batch", 0.3):
                time.sleep(0.1)
        with dog.during("saving", 0):
            time.sleep(0.5)
        assert not ends
        dog.begin("another update", 0.05)
        time.sleep(0.3)
    assert ends and ends[0].startswith("another update has taken")
