"""What becomes of a run that is told to stop: SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (Slurm)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from megabyte_jax import files
from megabyte_jax.errors import RunError

EXIT_STATUS = 143
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


class Preemption:
    """Ends the process with its last update saved, when a signal says so.

    A thread does it and not the main one, which a compilation or a wait for data may hold up for
    minutes. The two take turns with the state: the main thread has it but for the blocks of
    `waiting`, in which it does not change. Several processes have to save the same update; there
    the main threads agree on it, see `distributed.preempted_together`.

    Without `listening` nothing is ever requested, as in a notebook, where Ctrl-C is the notebook's.

    Attributes:
        alone: whether this process is all of the run.
    """

    def __init__(self) -> None:
        """Does not listen yet."""
        self._signal: signal.Signals | None = None
        self._turn = threading.Lock()
        self.alone = True
        self._save: Callable[[], str] = lambda: "nothing is to be saved"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over, in the main thread; after the block they change nothing."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        # Written to by the signal itself, whatever the main thread does at the time.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(read,), name="preemption", daemon=True).start()
        try:
            yield
        finally:
            # Python takes its own handlers off before the process is gone: a signal that comes so
            # late would take the place of the status.
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @property
    def requested(self) -> bool:
        """Whether the run was told to stop."""
        return self._signal is not None

    def _listen(self, pipe: int) -> None:
        number = 0
        while number not in _SIGNALS:  # others write their number too
            number = os.read(pipe, 1)[0]
        self._signal = signal.Signals(number)
        files.say(f"{self._signal.name}: stopping ...")
        if self.alone:
            self._turn.acquire()
            self.leave()

    @contextlib.contextmanager
    def holding(self, save: Callable[[], str]) -> Iterator[None]:
        """Inside there is a state to be saved.

        Args:
            save: saves it and returns what to say of that.
        """
        self._acquire()
        outer, self._save = self._save, save
        try:
            yield
        finally:
            self._save = outer
            self._turn.release()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the state does not change and may be saved by the thread."""
        self._turn.release()
        try:
            yield
        finally:
            self._acquire()

    def _acquire(self) -> None:
        while self.requested and self.alone:
            threading.Event().wait()  # the thread ends the process
        self._turn.acquire()

    def leave(self) -> NoReturn:
        """Saves the state and ends the process."""
        from megabyte_jax import distributed

        name = self._signal.name if self._signal else "another process"
        status = EXIT_STATUS
        try:
            line = f"preempted by {name}: {self._save()}"
        except RunError as error:
            status = error.exit_status
            line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}"
        except BaseException:
            status, line = 1, traceback.format_exc()
        files.say(line)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if not self.alone:
            from megabyte_jax import distributed  # takes seconds, if it is not there already

            if status != EXIT_STATUS:
                distributed.tell(status, line)
            distributed.leave()
        os._exit(status)  # the main thread may be in the middle of a compilation
