"""The real train.py in a process of its own, watched, signalled and compared with another run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from megabyte_jax import run_config
from tests import runs, xla
from tests.faults import forge

CACHE = runs.ROOT / ".cache" / "jax"
# One device, whose results depend on the number of cores: every process is held to one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
TIMES = ("bytes_per_second", "utilisation")
SAVED = r"update (\d+): checkpoint saved and verified"
STARTED = r"updates (\d+) to (\d+)"


# Of this process: the data, and the runs that nothing interrupted.
SHARED = tempfile.TemporaryDirectory(prefix="faults-")


class Outcome(NamedTuple):
    """Of the tries of a lane.

    Attributes:
        lost: what was wrong, once for each try that did not survive.
        worst: seconds that a response took; 0 where nothing is timed.
        where: the worst one.
    """

    lost: list[str]
    worst: float = 0.0
    where: str = ""


class Trainer:
    """One life of a run; at the end of the block it is dead.

    Attributes:
        lines: of its stderr so far, each with when it came.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        fault: str = "",
        devices: int = 1,
    ) -> None:
        """Starts it.

        Args:
            config: as the flags of train.py can give it.
            workdir: the work directory.
            fault: as child.py takes it; none is train.py as it is.
            devices: that are simulated.
        """
        fault = " ".join(filter(None, [fault, os.environ.get("MEGABYTE_BUG", "")]))
        flags = [f"--config={runs.ROOT}/configs/base.py", f"--workdir={workdir}", *changes(config)]
        self.workdir, self.lines = workdir, list[tuple[float, str]]()
        self._news = threading.Condition()
        environment = {**os.environ, **ENVIRONMENT, "XLA_FLAGS": xla.flags(devices)}
        self.process = forge.Forged([fault, *flags], environment)
        os.sched_setaffinity(self.process.pid, {core()})
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._news:
                self.lines.append((time.monotonic(), line.rstrip()))
                self._news.notify_all()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.end()
        self.process.stderr.close()

    @property
    def said(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, pattern: str, timeout: float = 90) -> bool:
        """Whether a line that matches came before the process ended."""
        found = re.compile(pattern)
        deadline = time.monotonic() + timeout
        seen = 0
        while time.monotonic() < deadline:
            with self._news:
                self._news.wait_for(lambda seen=seen: len(self.lines) > seen, 0.05)
                new, seen = self.lines[seen:], len(self.lines)
            if any(found.search(line) for _, line in new):
                return True
            if not new and not self._reader.is_alive():
                return False
        return False

    def send(self, number: int) -> bool:
        """Sends a signal; whether the process still ran."""
        running = self.process.poll() is None
        if running:
            self.process.send_signal(number)
        return running

    def kill(self) -> bool:
        """SIGKILL; whether the process still ran, and so died of it."""
        self.send(signal.SIGKILL)
        return self.end() == -signal.SIGKILL

    def end(self, timeout: float = 120) -> int:
        """Waits for the end and returns the status; -9 if it did not come in time."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        return self.process.returncode

    def orphans(self) -> list[int]:
        """Processes that it started and that outlive it."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                # After the name in brackets: state, parent, group, session.
                if int(status.read_text().rpartition(")")[2].split()[3]) == self.process.pid:
                    found.append(int(status.parent.name))
        return found

    def announced(self) -> int:
        """The newest update that was announced as saved; 0 for none."""
        return max((int(n) for n in re.findall(SAVED, self.said)), default=0)

    def started_at(self) -> int:
        """The update this life began after; -1 if it did not come so far."""
        found = re.search(STARTED, self.said)
        return int(found[1]) if found else -1


def core() -> int:
    """The core for the children of this process: workers of pytest spread over those there are."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return cores[int(worker) % len(cores)]


def changes(config: ConfigDict) -> list[str]:
    """The flags by which a config differs from configs/base.py."""
    before, after = (run_config.flatten(c) for c in (base.get_config(), config))
    return [f"--config.{k}={v}" for k, v in after.items() if v != before[k]]


@functools.cache
def text() -> Path:
    """A small corpus."""
    directory = Path(SHARED.name) / "text"
    directory.mkdir()
    words = "the a of megabyte patch global local byte\n été ∑ model".split(" ")
    for i in range(40):
        contents = " ".join(words[(i * j) % len(words)] for j in range(i * 7 % 50 or 3))
        (directory / f"{i:02}.txt").write_text(contents, encoding="utf-8")
    return directory


def tiny(**changed: Any) -> ConfigDict:
    """A run of 60 updates with dropout that takes seconds; it saves every seventh."""
    defaults = {
        "train.grad_accumulation": 1,
        "train.num_steps": 60,
        "eval.interval": 20,
        "checkpoint.interval": 7,
        "sample.num_bytes": 0,  # to compile that takes longer than all updates
    }
    return runs.tiny_config(text(), **(defaults | changed))


def whole(config: ConfigDict, devices: int = 1) -> Path:
    """The run of a config that nothing interrupts; made once, without any bug.

    Raises:
        RuntimeError: it did not end well.
    """
    flags = "\n".join(changes(config)).encode()
    workdir = Path(SHARED.name) / f"{hashlib.sha256(flags).hexdigest()}-{devices}"
    if not workdir.exists():
        with Trainer(config, workdir, devices=devices) as life:
            if life.end() != 0:
                raise RuntimeError(f"status {life.process.returncode}: {life.said}")
    return workdir


def checkpoints(workdir: Path) -> list[int]:
    """Steps of the checkpoints, of which there may be none."""
    return runs.saved_steps(workdir) if (workdir / "checkpoints").is_dir() else []


def differences(workdir: Path, config: ConfigDict, devices: int = 1) -> list[str]:
    """In what a run is not the uninterrupted one."""
    return differences_of(workdir, whole(config, devices))


def differences_of(*paths: Path) -> list[str]:
    """In what one run is not another: records, parameters, the optimizer's state."""
    one, two = (
        [{k: v for k, v in record.items() if k not in TIMES} for record in runs.records(path)]
        for path in paths
    )
    found = [f"{a} is not {b}" for a, b in zip(one, two, strict=False) if a != b][:1]
    if len(one) != len(two):
        found.append(f"{len(one)} records and not {len(two)}")
    steps = [max(checkpoints(path), default=0) for path in paths]
    if steps[0] != steps[1]:
        return [*found, f"ends at update {steps[0]} and not {steps[1]}"]
    folders = [path / "checkpoints" / str(steps[0]) for path in paths]
    # Each shard is a file of its plain bytes, whatever number of processes wrote them.
    mine, others = (
        {str(file.relative_to(folder)): file.read_bytes() for file in runs.array_files(folder)}
        for folder in folders
    )
    return found + [
        f"{name} differs" for name in sorted(mine | others) if mine.get(name) != others.get(name)
    ]
