import json
import os
import subprocess
import sys
import time

import pytest

from megabyte_jax import lock
from megabyte_jax.errors import LockedError, UserError
from tests import runs

HOLDER = """
import sys, time
from megabyte_jax import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    process = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield workdir, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_trainer_is_told_who_has_the_directory(holder):
    workdir, process = holder
    start = time.monotonic()
    with pytest.raises(LockedError, match=rf"in use by process {process.pid} on .*, since 20"):
        with lock.hold(str(workdir)):
            pass
    assert time.monotonic() - start < 5


def test_the_lock_of_a_process_that_was_killed_is_taken_over(holder):
    workdir, process = holder
    process.kill()
    process.wait()
    with lock.hold(str(workdir)):
        assert json.loads((workdir / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_file_that_was_copied_locks_nothing(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1, "host": "elsewhere", "started": "2020"}')
    with lock.hold(str(tmp_path)):
        with pytest.raises(LockedError):
            with lock.hold(str(tmp_path)):
                pass
    with lock.hold(str(tmp_path)):
        pass


def test_a_directory_made_for_a_run_that_did_not_begin_is_removed(tmp_path):
    with pytest.raises(KeyError):
        with lock.hold(str(tmp_path / "new" / "run")):
            raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock.hold(str(tmp_path / "run")):
        (tmp_path / "run" / "config.json").touch()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "lock"]


def test_a_path_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    for workdir in ("", str(tmp_path / "file"), str(tmp_path / "file" / "run")):
        with pytest.raises(UserError, match=f"--workdir={workdir}.*accepted is a directory"):
            with lock.hold(workdir):
                pass
