"""Work directories that are full, too small, read-only, gone, or short of open files."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults import driver
from tests.faults.driver import Outcome, Trainer

SLOWLY = "data:0:sleep=0.05"  # so that there is time to do something between two saves
REPORT_SECONDS, REFUSE_SECONDS = 5, 15


@contextlib.contextmanager
def disk(scratch: Path, size: int) -> Iterator[Path]:
    """A file system of some bytes; root alone can make one."""
    path = Path(tempfile.mkdtemp(dir=scratch))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def can_mount(scratch: Path) -> bool:
    """Whether this process may make file systems."""
    try:
        with disk(scratch, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _fill(path: Path, left: int) -> None:
    """Leaves some bytes of a file system free."""
    free = os.statvfs(path)
    with open(path / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - left, 1))


def _blocks(checkpoint: Path) -> int:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def full(scratch: Path, tries: int, seed: int) -> Outcome:
    """A disk with room for some part of a checkpoint, from none to nearly all of it."""
    config, lost, worst = driver.tiny(), [], 0.0
    for i in range(tries):
        part = (i + random.Random(seed).random()) / tries
        with disk(scratch, 64 << 20) as path:
            problem, seconds = _one_full_disk(config, path, part)
            worst = max(worst, seconds)
            problem = problem or next(iter(driver.differences(path / "run", config)), "")
        lost += [f"room for {part:.0%} of a checkpoint: {problem}"] if problem else []
    return Outcome(lost, worst, "until the failure was reported")


def _unusual(life: Trainer) -> str:
    usual = re.compile("^(step|saving|update .* verified)")
    return "\n".join([line for _, line in life.lines if not usual.match(line)][:30])


def _one_full_disk(config: driver.ConfigDict, path: Path, part: float) -> tuple[str, float]:
    workdir, seconds = path / "run", 0.0
    with Trainer(config, workdir, SLOWLY) as life:
        life.wait_for("^update 14: checkpoint saved")
        kept = driver.checkpoints(workdir)
        _fill(path, int(part * _blocks(workdir / "checkpoints" / str(kept[0]))))
        if not life.wait_for("checkpoint NOT saved|error: ", 30):
            return f"not reported: {life.said[-1000:]}", seconds
        if not set(kept) & set(driver.checkpoints(workdir)):
            return "the earlier checkpoints are gone", seconds
        (path / "ballast").unlink()
        status = life.end()
        times = {line: at for at, line in life.lines}
        said = [line for line in times if "NOT saved" in line or "error: " in line]
        begun = max(at for at, line in life.lines if line == "saving ..." and at <= times[said[0]])
        seconds = times[said[0]] - begun
        if status not in (0, 5) or seconds > REPORT_SECONDS:
            return f"status {status}, {seconds:.1f} s: {_unusual(life)}", seconds
        failed = set(re.findall(r"update (\d+): checkpoint NOT saved", life.said))
        if failed & set(re.findall(driver.SAVED, life.said)):
            return f"announced and failed: {life.said[-1000:]}", seconds
    if status == 5:
        with Trainer(config, workdir) as life:
            if life.end() != 0:
                return f"after the disk had room again: {life.said[-1000:]}", seconds
    return "", seconds


def unusable(scratch: Path, tries: int, seed: int) -> Outcome:
    """Directories that are refused before anything is compiled: too small, read-only, a file."""
    file = scratch / "file"
    file.write_text("x")
    lost, worst, where = [], 0.0, ""
    with disk(scratch, 1 << 16) as small, disk(scratch, 1 << 20) as frozen:
        subprocess.run(["mount", "-o", "remount,ro", frozen], check=True)
        places = {"small": small, "read-only": frozen, "file": file, "in a file": file / "run"}
        assert tries == len(places)
        for name, place in places.items():
            begun = time.monotonic()
            with Trainer(driver.tiny(), place) as life:
                status = life.end(60)
            seconds = time.monotonic() - begun
            worst, where = max((worst, where), (seconds, name))
            errors = [line for _, line in life.lines if "error: " in line]
            if (
                status not in (2, 5)
                or len(errors) != 1
                or str(place) not in errors[0]
                or "compiling" in life.said
                or seconds > REFUSE_SECONDS
            ):
                lost.append(f"{name}: status {status}, {seconds:.1f} s: {life.said[-1000:]}")
    return Outcome(lost, worst, where)


def vanishing(scratch: Path, tries: int, seed: int) -> Outcome:
    """The work directory is removed in a run: it is told, and what it then calls saved is there.

    The next save makes the directory again, so that the run may well end with its last update
    saved; what was in the directory besides is lost.
    """
    lost, worst = [], 0.0
    for i in range(tries):
        workdir = scratch / f"{i}"
        with Trainer(driver.tiny(), workdir, SLOWLY) as life:
            life.wait_for("^update 7: checkpoint saved")
            time.sleep(random.Random(seed + i).uniform(0, 0.5))
            begun = time.monotonic()
            shutil.rmtree(workdir, ignore_errors=True)
            told = life.wait_for("cannot be written|checkpoint NOT saved|error: ", 30)
            worst = max(worst, time.monotonic() - begun)
            status = life.end(60)
            there = max(driver.checkpoints(workdir), default=0) == 60
            if not told or status not in (0, 5) or (status == 0 and not there):
                lost.append(f"status {status}: {_unusual(life)}")
    return Outcome(lost, worst, "until it was told")


def few_files(scratch: Path, tries: int, seed: int) -> Outcome:
    """Fewer open files than the run needs: it works, or ends with one line; both resume."""
    config, lost = driver.tiny(), []
    for i in range(tries):
        limit = f"nofile:{64 if tries == 1 else 24 + 8 * i}"
        with Trainer(config, scratch / f"{i}", limit) as life:
            status = life.end()
            if status and life.said.count("train.py: error: ") != 1:
                lost.append(f"{limit}, status {status}: {_unusual(life)}")
                continue
        with Trainer(config, scratch / f"{i}") as life:
            status = life.end()
        problems = [f"status {status}"] if status else driver.differences(scratch / f"{i}", config)
        lost += [f"{limit}: {problem}" for problem in problems[:1]]
    return Outcome(lost)
