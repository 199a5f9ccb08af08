"""Ends a run that no longer gets on, and says where it stands."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

EXIT_STATUS = 8
_TICK = 0.5  # seconds


class Watchdog:
    """A thread that ends the process when one thing takes longer than it may.

    Only time in which the process itself runs counts: a machine that was stopped for a while is no
    hang. What is done is known by name, each with a limit of its own, so that a long evaluation is
    none either.
    """

    def __init__(self) -> None:
        """Watches nothing yet."""
        self._task, self._limit, self._since = "", 0.0, 0.0
        self._clock = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Starts the thread, which ends with the block."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the thread."""
        self._done.set()
        self._thread.join()

    def begin(self, task: str, limit: float) -> None:
        """Says what is done from now on.

        Args:
            task: as it is to be named.
            limit: seconds it may take; 0 for any time.
        """
        self._task, self._limit, self._since = task, limit, self._clock

    @contextlib.contextmanager
    def during(self, task: str, limit: float) -> Iterator[None]:
        """Says what is done inside; afterwards what was done before begins anew.

        Args:
            task: as it is to be named.
            limit: seconds it may take; 0 for any time.
        """
        outer = self._task, self._limit
        self.begin(task, limit)
        try:
            yield
        finally:
            self.begin(*outer)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._done.wait(_TICK):
            now = time.monotonic()
            self._clock += min(now - before, 2 * _TICK)
            before = now
            task, limit, took = self._task, self._limit, self._clock - self._since
            if limit and took > limit:
                self._end(f"{task} has taken {took:.0f} s, more than the {limit:g} s it may")

    def _end(self, text: str) -> None:
        from megabyte_jax import distributed

        name = os.path.basename(sys.argv[0])
        try:
            # Not by way of Python's buffers or a progress bar, whose locks what hangs may hold.
            faulthandler.dump_traceback(2, all_threads=True)
            os.write(2, f"{name}: error: {text}; status {EXIT_STATUS}\n".encode())
            distributed.tell(EXIT_STATUS, text)
        finally:
            os._exit(EXIT_STATUS)  # what hangs cannot be waited for
