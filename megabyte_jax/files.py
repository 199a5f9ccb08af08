"""Files on a disk that may be full, read-only or gone: whole, or as they were."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

# Some megabytes of metrics; of more the oldest are lost, and counted.
MAX_WAITING = 10_000


class Log:
    """A file to which whole records are appended, and which never keeps half of one.

    A record that cannot be written waits in memory, and those after it too, until all can be; that
    is tried with each new record, so it costs no thread. A file that has vanished is not made
    again: where the disk of a run is gone, its directory may be one of another disk.
    """

    def __init__(self, path: Path, name: str, say: Callable[[str], None]) -> None:
        """Makes the file, or goes on with one of whole records.

        Args:
            path: of the file.
            name: of the log, for what is said.
            say: prints a line: once when a record cannot be written, and when all are again.

        Raises:
            OSError: it cannot be opened for writing.
        """
        path.open("ab").close()
        self._path, self._name, self._say = path, name, say
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._lost, self._fault = 0, ""
        self._whole = sys.maxsize  # bytes of the file before what may be half a record

    def append(self, record: bytes) -> None:
        """Writes a record after those that wait, or lets it wait too.

        Args:
            record: all of it, with what ends it.
        """
        self._lost += len(self._waiting) == MAX_WAITING
        self._waiting.append(record)
        self._write_waiting()

    def close(self) -> None:
        """Tries once more to write what waits; says how much is lost."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            lost = _records(self._lost + len(self._waiting))
            self._say(f"{self._name} cannot be written: {self._fault}; {lost} lost")

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            reason = error.strerror or str(error)
            if not self._fault:
                wait = _records(len(self._waiting))
                self._say(f"{self._name} cannot be written: {reason}; {wait} waiting")
            self._fault = reason
            return
        if self._fault:
            lost = _records(self._lost) if self._lost else "nothing"
            self._say(f"{self._name} is written again; {lost} lost")
            self._fault, self._lost = "", 0

    def _write(self, record: bytes) -> None:
        # Opened each time: a file that has vanished is noticed, and network file systems tell of
        # a full disk or quota when a file is closed.
        with open(self._path, "r+b", buffering=0) as file:
            self._whole = min(self._whole, file.seek(0, os.SEEK_END))
            self._cut(file.fileno())
            file.seek(self._whole)
            try:
                while record:  # the second write of a record tells why the first was short
                    record = record[os.write(file.fileno(), record) :]
            except OSError:
                self._cut(file.fileno())  # or, if that fails too, before the next record
                raise
        self._whole = sys.maxsize

    def _cut(self, file: int) -> None:
        if os.fstat(file).st_size > self._whole:
            os.ftruncate(file, self._whole)


def say(text: str) -> None:
    """Prints a line on stderr, above a progress bar if there is one; any thread may.

    A stderr that takes nothing, on a full disk or of a reader that is gone, ends no run.

    Args:
        text: without the end of its line.
    """
    from tqdm import tqdm

    with contextlib.suppress(OSError):
        # In one write, between whose halves no other thread can print.
        tqdm.write(f"{text}\n", file=sys.stderr, end="")
        sys.stderr.flush()


def replace(path: Path, contents: bytes) -> None:
    """Writes a file whole, in the place of an old one, or leaves the old one.

    Args:
        path: of the file.
        contents: of the file.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())  # the old file must not go before the new one is on the disk
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"
