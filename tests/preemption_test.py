import subprocess
import sys

import pytest

from tests import runs

# The last object of a module goes after Python has taken its handlers of signals off.
LATE = """
import os, signal
from megabyte_jax.preemption import Preemption

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.{name}):
        kill(process, number)

late = Late()
with Preemption().listening():
    pass
raise SystemExit({status})
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("status", [0, 6])
def test_a_signal_to_a_process_that_ends_changes_no_status(name, status):
    program = LATE.format(name=name, status=status)
    ended = subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, capture_output=True)
    assert (ended.returncode, ended.stderr) == (status, b"")
