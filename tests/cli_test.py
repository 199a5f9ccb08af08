import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from megabyte_jax import cli
from megabyte_jax.errors import CheckpointError, NonFiniteError, UserError
from tests import runs


def run(monkeypatch, main, *arguments):
    """Runs an entry point of no flags; the status it exits with."""
    for name in set(flags.FLAGS) - runs.FLAGS_OF_LIBRARIES:
        delattr(flags.FLAGS, name)
    monkeypatch.setattr(sys, "argv", ["/x/it.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    return exit.value.code or 0


@pytest.mark.parametrize(
    "error, status",
    [(UserError, 2), (CheckpointError, 4), (NonFiniteError, 6)],
)
def test_an_error_of_ours_is_one_line_and_its_status(monkeypatch, capfd, error, status):
    def main():
        raise error("this\n  is  wrong")

    assert run(monkeypatch, main) == status
    assert capfd.readouterr() == ("", "it.py: error: this is wrong\n")


def test_an_error_has_its_status_where_stderr_is_on_a_full_disk():
    code = (
        "from megabyte_jax import cli, errors\n"
        "def main(): raise errors.StorageError('full')\n"
        "cli.run(main)\n"
    )
    with open("/dev/full", "w") as full:
        made = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, stderr=full)
    assert made.returncode == 5


def test_an_error_in_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["it.py"])
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_an_interrupt_is_one_line(monkeypatch, capfd):
    def main():
        raise KeyboardInterrupt

    assert run(monkeypatch, main) == 130
    assert capfd.readouterr().err == "it.py: error: interrupted\n"


def test_the_status_is_what_the_entry_point_returns(monkeypatch):
    assert [run(monkeypatch, lambda value=value: value) for value in (None, 0, 3)] == [0, 0, 3]


@pytest.mark.parametrize("argument", ["word", "--nothing=1"])
def test_what_no_flag_takes_is_refused_before_the_work(monkeypatch, capfd, argument):
    assert run(monkeypatch, lambda: 99, argument) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_writable_file_is_told_from_others_and_not_touched(tmp_path):
    (tmp_path / "old").write_text("x")
    for name in ("old", "new", "deep/er/new"):
        cli.require_writable("--output", tmp_path / name)
    assert runs.contents(tmp_path) == {"deep": None, "deep/er": None, "old": b"x"}
    for path in (tmp_path, tmp_path / "old/new", Path("/proc/nothing/x")):
        with pytest.raises(UserError, match=f"--output={path}: accepted is a file"):
            cli.require_writable("--output", path)


def test_neither_the_package_nor_help_waits_for_jax():
    code = (
        "import megabyte_jax, runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'jax', 'flax', 'orbax', 'optax'} & set(sys.modules)))\n"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True)
    assert made.stdout.endswith(b"[]\n") and b"--workdir" in made.stdout, made.stderr


def test_a_reader_that_stops_reading_is_no_error(finished_run):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "generate.py", f"--workdir={finished_run}", "--num_bytes=2"]
    made = subprocess.run(command, cwd=runs.ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert made.returncode == 0 and made.stderr == b"compiling ...\n"


def test_a_file_is_replaced_whole_with_its_permissions_and_its_links(tmp_path):
    (tmp_path / "old").write_text("x")
    (tmp_path / "old").chmod(0o600)
    (tmp_path / "link").symlink_to("old")
    for name in ("new", "link"):
        cli.write_file("--output", tmp_path / name, b"abc")
    assert runs.contents(tmp_path) == {"link": b"abc", "new": b"abc", "old": b"abc"}
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").stat().st_mode & 0o777 == 0o600


def test_a_name_that_is_a_directory_is_no_file(tmp_path):
    for path in (f"{tmp_path}/new/", "", "/", "/proc/x", "/dev/null"):
        with pytest.raises(UserError, match=f"OUT={path}: accepted is a file"):
            cli.require_writable("OUT", path)
