import os
import subprocess
import sys
import time

import pytest

from megabyte_jax.data.scratch import scratch_directory

HOLD = """
import pathlib, sys
from megabyte_jax.data.scratch import scratch_directory
with scratch_directory(pathlib.Path(sys.argv[1])) as part:
    (part / "file").write_text("x")
    print(part, flush=True)
    sys.stdin.read()
"""


def age(path):
    os.utime(path, (time.time() - 3600,) * 2)


def test_it_is_gone_with_the_block_and_what_was_renamed_stays(tmp_path):
    with pytest.raises(ValueError, match="on the way"), scratch_directory(tmp_path / "new") as part:
        (part / "whole").mkdir()
        (part / "half").mkdir()
        (part / "whole").rename(tmp_path / "new" / "kept")
        raise ValueError("on the way")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_only_what_a_killed_process_left_is_removed(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    killed, working = (tmp_path / process.stdout.readline().strip() for process in started)
    started[0].kill()
    started[0].communicate()
    with scratch_directory(tmp_path):
        assert killed.exists()  # it may have been made just now
    age(killed), age(working)
    with scratch_directory(tmp_path) as part:
        assert {*tmp_path.iterdir()} == {working, part}
    started[1].communicate()
    assert [*tmp_path.iterdir()] == []
