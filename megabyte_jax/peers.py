"""Signs of life, failures and wishes to stop between the processes of a run.

All of it goes through the key-value store of JAX's coordinator, which is in process 0, by a thread
of each process; no device takes part, so it works while they wait for each other.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from megabyte_jax.errors import PeerError

TICK = 1.0  # seconds between two looks at the store
GRACE = 10.0  # seconds in which a process that fails as well says so itself
FOREVER = 10 * 24 * 3600 * 1000  # in milliseconds; it is this thread that notices who is lost
HANG = 8
ROOT = "megabyte_jax"


class Peers:
    """The other processes of this one, from `start` to its end.

    Attributes:
        hosts: of each process.
    """

    def __init__(
        self,
        client: Any,
        coordinator: str,
        process: int,
        hosts: Sequence[str],
        peer_seconds: float,
    ):
        """Nothing is watched yet.

        Args:
            client: of JAX's.
            coordinator: HOST:PORT.
            process: number of this one.
            hosts: of each process.
            peer_seconds: as in `distributed.start`.
        """
        self.hosts = hosts
        self._client = client
        self._coordinator = coordinator
        self._process = process
        self._peer_seconds = peer_seconds
        self._changed = threading.Condition()
        # All of these are read and written under the lock of the condition.
        self._calls = 0  # of `stop_together`
        self._waiting = False  # in one of them
        self._wish = False
        self._bound: int | None = None  # the first call at which this process can still stop
        self._stop: int | None = None  # the call at which all stop
        self._failure: tuple[int, str] | None = None  # of this process
        self._told = False  # it is in the store
        self._over = False
        self._rounds = 0

    def start(self) -> None:
        """Starts the threads, and to leave at the exit of the process."""
        _hold_aborts()
        targets = [self._exchange, self._await_end]
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()
        if self._process:
            threading.Thread(target=self._watch_coordinator, daemon=True).start()
        atexit.register(self.leave)

    def stop_together(self, wish: bool) -> bool:
        """Whether all processes stop here; each calls this once after each update.

        Where none wishes to, that is a look at a flag. Else each process promises by its thread,
        which it can while its devices wait for others, to go no further than the next call until
        all have promised. The furthest of these calls is where all stop.
        """
        with self._changed:
            self._calls += 1
            if wish and not self._wish:
                self._wish = True
                self._changed.notify_all()
            if not self._wish and self._bound is None:
                return False
            self._waiting = True
            self._changed.wait_for(lambda: self._stop is not None)
            self._waiting = False
            return self._stop is not None and self._calls >= self._stop

    def tell(self, status: int, error: BaseException | str) -> None:
        """Tells the others that this process ends, and why, so that they need not wait for it.

        What JAX raises may come of a process that is lost; then a thread ends this one.
        """
        text = f"{error}"
        if isinstance(error, jax.errors.JaxRuntimeError):
            if "RESOURCE_EXHAUSTED" not in text and self._peer_seconds:
                time.sleep(self._peer_seconds + GRACE)
            text = f"{type(error).__name__}: {text}"
        with self._changed:
            self._failure = self._failure or (status, text)
            self._changed.notify_all()
            # Not for ever, as the coordinator may be what this is about.
            self._changed.wait_for(lambda: self._told, 3 * TICK)
        if status == HANG and self._process == 0:
            time.sleep(2 * TICK)  # as in `_exit`

    def leave(self) -> None:
        """Waits for the other processes to end; the threads watch that meanwhile."""
        if self._over:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            self._client.wait_at_barrier(f"{ROOT}/leave", FOREVER)
        except jax.errors.JaxRuntimeError:
            time.sleep(2 * TICK)  # a thread knows better what that means
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._process == 0:
            self._put_end(0, "")
        # None must be in a call of JAX's when Python comes to its end.
        for thread in self._threads:
            thread.join()

    def _exchange(self) -> None:
        silent: dict[int, tuple[str, int]] = {}
        try:
            while self._round():
                if self._process == 0 and self._peer_seconds:
                    self._judge(silent)
        except jax.errors.JaxRuntimeError:
            pass  # `_await_end` gets it too

    def _round(self) -> bool:
        """Puts what there is to tell into the store and gets what the others have promised."""
        with self._changed:
            # What somebody waits for is not put off to the next tick.
            self._changed.wait_for(self._urgent, TICK)
            if self._over:
                return False
            self._rounds += 1
        self._client.key_value_set(f"{ROOT}/beat/{self._process}", str(self._rounds), True)
        stops = self._client.key_value_dir_get(f"{ROOT}/stop/")
        with self._changed:
            promised = self._bound is not None
            if (stops or self._wish) and not promised:
                self._bound = self._calls if self._waiting else self._calls + 1
            if len(stops) == len(self.hosts):
                self._stop = max(int(bound) for _, bound in stops)
                self._changed.notify_all()
            failure = None if self._told else self._failure
        if self._bound is not None and not promised:
            self._client.key_value_set(f"{ROOT}/stop/{self._process}", str(self._bound))
        if failure:
            self._put_end(*failure, self._process)
            with self._changed:
                self._told = True
                self._changed.notify_all()
        return True

    def _urgent(self) -> bool:
        told = self._failure is not None and not self._told
        return self._over or told or (self._wish and self._bound is None)

    def _put_end(self, status: int, text: str, process: int | None = None) -> None:
        try:
            value = json.dumps([status, text, process])
            self._client.key_value_set(f"{ROOT}/end", value)
        except jax.errors.JaxRuntimeError:
            pass  # another process was first

    def _judge(self, silent: dict[int, tuple[str, int]]) -> None:
        """Counts ticks and no time, as those are not the others' in which this process slept."""
        for key, beat in self._client.key_value_dir_get(f"{ROOT}/beat/"):
            process = int(key.rpartition("/")[2])
            before, ticks = silent.get(process, ("", 0))
            silent[process] = beat, ticks + 1 if beat == before else 0
        lost = [i for i, (_, ticks) in silent.items() if ticks * TICK >= self._peer_seconds]
        if lost:
            who = ", ".join(self._name(process) for process in sorted(lost)[:8])
            self._put_end(
                PeerError.exit_status, f"no sign of life of {who} for {self._peer_seconds:g} s"
            )

    def _await_end(self) -> None:
        """Ends this process after another that is lost or has failed."""
        try:
            end = self._client.blocking_key_value_get(f"{ROOT}/end", FOREVER)
        except jax.errors.JaxRuntimeError:
            self._exit(PeerError.exit_status, f"{self._name(0)} is gone")
        status, text, process = json.loads(end)
        if status == 0:  # all have come to `leave`, and past its barrier
            return
        if status not in (PeerError.exit_status, HANG):
            with self._changed:
                self._changed.wait_for(lambda: self._over, GRACE)
        if not self._over:
            self._exit(status, text, process)

    def _watch_coordinator(self) -> None:
        """Calls of the store cannot tell: they do not return when process 0 hangs or is gone."""
        rounds, ticks = 0, 0
        while not self._over:
            time.sleep(TICK)
            ticks = ticks + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if ticks and _refused(self._coordinator):
                self._exit(PeerError.exit_status, f"{self._name(0)} is gone")
            if self._peer_seconds and ticks * TICK >= self._peer_seconds:
                seconds = f"{self._peer_seconds:g} s"
                self._exit(
                    PeerError.exit_status, f"no sign of life of {self._name(0)} for {seconds}"
                )

    def _name(self, process: int) -> str:
        return f"process {process} on {self.hosts[process]}"

    def _exit(self, status: int, text: str, process: int | None = None) -> NoReturn:
        if self._process == 0:
            time.sleep(2 * TICK)  # the store goes with this process, and all are to read it
        if self._failure:
            os._exit(self._failure[0])
        if process is None:
            text += "; started again, the run goes on from its last checkpoint"
        elif process == self._process:
            os._exit(status)
        else:
            text = f"on {self._name(process)}: {text}"
        if status == HANG:
            faulthandler.dump_traceback(all_threads=True)
        line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(text.split())}\n"
        # Past Python's buffers, whose locks a thread that hangs may hold.
        os.write(2, line.encode())
        os._exit(status)


def _refused(address: str) -> bool:
    """Whether nobody listens there; a process that is stopped still does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TICK).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def _hold_aborts() -> None:
    """Delays an abort by six seconds.

    JAX aborts a process as soon as process 0 is gone; that leaves a thread the time to say so.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    # As a handler it gets the number of the signal, and is safe in one.
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    if enabled:  # it prints the stacks, then calls the handler before it
        faulthandler.enable()
