"""The checkpoints of a run that trains, written by Orbax and verified by their manifests."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from megabyte_jax import distributed, files, manifest, restoring, skips
from megabyte_jax.errors import CheckpointError, NonFiniteError, StorageError
from megabyte_jax.training import TrainState

_FAILURES = 3  # in a row, after which a run ends


class Checkpoints:
    """The checkpoints of a run that trains; they are written while it goes on.

    A checkpoint counts as saved when it is committed under its step, its files have been read back
    and have the digests of the arrays they were written from. Only then are older ones removed.

    Attributes:
        step: of the newest that is saved, or was restored; None if there is none.
    """

    def __init__(self, workdir: Path, checkpoint: Any, facts: Mapping[str, Any]) -> None:
        """Removes what a run that was killed left unfinished; all processes do this.

        Args:
            workdir: the work directory.
            checkpoint: `config.checkpoint`, which says how many are kept.
            facts: to be kept in each manifest: `skip`, the ranges of batches left out, and
                `environment`.

        Raises:
            StorageError: there can be no checkpoints.
        """
        self.step: int | None = None
        self._directory = workdir.absolute() / "checkpoints"
        self._keep, self._keep_interval = checkpoint.keep, checkpoint.keep_interval
        self._interval, self._facts = checkpoint.interval, facts
        self._failures, self._reason = 0, ""
        self._writer = restoring.checkpointer()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        with distributed.together():
            if distributed.is_primary():
                try:
                    self._directory.mkdir(exist_ok=True)
                except OSError as error:
                    raise StorageError(f"{self._directory}: {error.strerror}") from None
                _remove_unfinished(self._directory)

    def __enter__(self) -> Checkpoints:
        """Returns itself; leaving the block waits for a save that is under way."""
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(restoring.no_traceback_of_tasks_given_up())
        return self

    def __exit__(self, *_: object) -> None:
        """Waits."""
        with self._stack:
            self.finish()
            self._pool.shutdown()
            self._writer.close()

    def save(self, state: TrainState) -> None:
        """Starts saving a state; it may be donated as soon as this returns.

        A save that fails is told when it does, and is no error before the third in a row.

        Args:
            state: after an update; all processes save the same.

        Raises:
            NonFiniteError: it is not finite; nothing is written.
            StorageError: the three last saves failed.
        """
        self.finish()
        self.require_storage()
        step, items = int(state.step), {"params": state.params, "opt_state": state.opt_state}
        if not bool(_all_finite(items)):
            raise NonFiniteError(f"update {step}: the state is not finite and is not saved")
        own = manifest.chunks(items)
        digests = {name: x for part in distributed.gather(own) for name, x in part.items()}
        facts = {
            "step": step,
            "skipped": skips.before(self._facts["skip"], step),
            "environment": self._facts["environment"],
        }
        arguments = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        description = ocp.args.JsonSave(manifest.make(items, digests, facts))
        try:
            if not self._directory.is_dir():  # Orbax would make it, where the disk of it was
                raise FileNotFoundError(f"{self._directory} is gone")
            self._writer.save(
                self._directory / str(step),
                args=ocp.args.Composite(**arguments, manifest=description),
            )
        # Orbax raises many types, the bare Exception among them.
        except Exception as error:
            self._fail(step, error)
        else:
            self._saving = self._pool.submit(self._complete, step, own)

    def save_now(self, state: TrainState) -> None:
        """Saves a state, unless that is done, and returns when it is; tries three times.

        Args:
            state: after an update.

        Raises:
            NonFiniteError: it is not finite.
            StorageError: it cannot be saved.
        """
        self.finish()
        while self.step != int(state.step):
            self.save(state)
            self.finish()

    def finish(self) -> None:
        """Waits for the save that is under way, if there is one."""
        if self._saving:
            self._saving.result()
            self._saving = None

    def require_storage(self) -> None:
        """Raises StorageError if the three last saves failed."""
        if self._failures >= _FAILURES:
            kept = "none" if self.step is None else f"that of update {self.step}"
            raise StorageError(
                f"--workdir={self._directory.parent}: {_FAILURES} checkpoints in a row could not "
                f"be saved ({self._reason}); the last good one is {kept}"
            )

    def _complete(self, step: int, own: Mapping[str, str]) -> None:
        """In a thread: waits for the commit, reads back what this process wrote, then says so."""
        path = self._directory / str(step)
        try:
            self._writer.wait_until_finished()
            manifest.verify(path, own)
        except Exception as error:
            self._fail(step, error)
            return
        self.step, self._failures = step, 0
        if distributed.is_primary():
            files.say(f"update {step}: checkpoint saved and verified")
            self._prune()

    def _fail(self, step: int, error: Exception) -> None:
        self._failures, self._reason = self._failures + 1, restoring.reason(error)
        kept = "none is saved" if self.step is None else f"the last is that of update {self.step}"
        files.say(f"update {step}: checkpoint NOT saved: {self._reason}; {kept}")
        with contextlib.suppress(Exception):
            self._writer.close()
        # What it had begun to write takes the space that the next one needs.
        if distributed.is_primary():
            _remove_unfinished(self._directory)
            with contextlib.suppress(OSError):
                _put_aside(self._directory / str(step))
        self._writer = restoring.checkpointer()

    def _prune(self) -> None:
        old = restoring.steps_of(self._directory)[: -self._keep]
        for step in old:
            if not self._keep_interval or step % self._keep_interval:
                with contextlib.suppress(OSError):  # it stays until the next time
                    _remove(self._directory / str(step))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest state that is what it was when it was saved.

        Newer ones are put aside, renamed: the run makes those again, and where they were they
        would stand in the way of that.

        Args:
            like: a state of the same shapes and types, which lies where the restored one is to
                lie: as `training.abstract_state` gives it, on any mesh.

        Returns:
            The state and its manifest; None if the run has no checkpoint.

        Raises:
            CheckpointError: none of the checkpoints there are can be used.
        """
        if not restoring.remains(self._directory):
            return None

        def require_history(body: Mapping[str, Any]) -> None:
            had = [tuple(pair) for pair in body["skipped"]]
            if had != list(skips.before(self._facts["skip"], body["step"])):
                raise CheckpointError(
                    f"it is from before the run left out other batches: it had left out {had}"
                )

        items = {"params": like.params, "opt_state": like.opt_state}
        step, restored, body = restoring.restore_newest(
            self._directory, items, require=require_history
        )
        newer = [saved for saved in restoring.steps_of(self._directory) if saved > step]
        with distributed.together():
            for saved in newer if distributed.is_primary() else ():
                _put_aside(self._directory / str(saved))
        self.step = step
        count = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(count, restored["params"], restored["opt_state"]), body

    def forget(self, after: int) -> None:
        """Removes the checkpoints after a step, as the run goes back to before it.

        Args:
            after: the last step that may stay.

        Raises:
            NonFiniteError: none would stay of a run that had one at that step or before it.
        """
        self.finish()
        steps = restoring.steps_of(self._directory)
        first = self._interval
        if first and after >= first and not any(step <= after for step in steps):
            raise NonFiniteError(
                f"--workdir={self._directory.parent}: no checkpoint of update {after} or before is "
                f"kept, only {steps}; accepted is a larger checkpoint.keep or a smaller "
                "guard.rollback_window"
            )
        with distributed.together():
            for step in steps if distributed.is_primary() else ():
                if step > after:
                    _remove(self._directory / str(step))


def require_space(workdir: Path, config: Any, like: TrainState) -> None:
    """Checks that there is room for as many checkpoints as are kept and one more.

    Args:
        workdir: the work directory.
        config: `config.checkpoint`.
        like: a state or its shapes and types.

    Raises:
        StorageError: there is not.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    directory = workdir / "checkpoints"
    there = len(restoring.steps_of(directory)) if directory.is_dir() else 0
    needed = size * max(config.keep + 1 - there, 1)
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise StorageError(
            f"--workdir={workdir}: {free:,} bytes are free; needed are {needed:,}, as a checkpoint "
            f"takes {size:,}"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _remove_unfinished(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if restoring.UNFINISHED.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint, of which a run that is killed meanwhile leaves no half."""
    shutil.rmtree(path.rename(path.with_suffix(".deleted")))


def _put_aside(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.damaged.{time.time_ns()}"))
