"""Starts lives that have the libraries imported already, which takes longer than all the rest.

There are a thousand of them, and each takes half the time so. They are processes of their own that
import train.py and the package themselves; that python train.py is no different, the tests in
tests/end_to_end see.
"""

import gc
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]

_idle: list["subprocess.Popen[bytes]"] = []


class Forged:
    """A life as a forge starts it, with the part of subprocess.Popen's interface that is needed."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._forge = _idle.pop() if _idle else _new(environment)
        read, write = os.pipe()
        self.stderr: IO[str] = os.fdopen(read)
        assert self._forge.stdin and self._forge.stdout
        request = {"arguments": arguments, "environment": environment}
        request["stderr"] = f"/proc/{os.getpid()}/fd/{write}"
        self._forge.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid = int(self._forge.stdout.readline())
        os.close(write)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status, None as long as it runs."""
        assert self._forge.stdout
        if self.returncode is None and select.select([self._forge.stdout], [], [], 0)[0]:
            self.returncode = int(self._forge.stdout.readline())
            _idle.append(self._forge)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The status, once it ended.

        Raises:
            subprocess.TimeoutExpired: it did not in time.
        """
        if self.returncode is None:
            select.select([self._forge.stdout], [], [], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("train.py", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Sends it, if the process runs; until then nobody else can have its number."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL, if it runs."""
        self.send_signal(9)


def _new(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    # A process to be forked is to have one thread.
    environment = {**environment, "OPENBLAS_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-m", "tests.faults.forge"], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, bufsize=0, env=environment)


def main() -> None:
    """Forks for each line of stdin; tells the number of the process, and its status at its end."""
    import flax.nnx  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorboardX  # noqa: F401

    gc.freeze()  # the lives have no need to look through all of this again and again

    for line in sys.stdin:
        request = json.loads(line)
        error = os.open(request["stderr"], os.O_WRONLY)
        pid = os.fork()
        if not pid:
            _live(error, request)
            return
        os.close(error)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _live(error: int, request: Any) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, file in enumerate((nothing, nothing, error)):
        os.dup2(file, number)
    os.closerange(3, 256)
    os.environ.update(request["environment"])
    sys.argv = ["tests.faults.child", *request["arguments"]]

    from tests.faults import child

    child.main()


if __name__ == "__main__":
    main()
