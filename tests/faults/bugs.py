"""Ten bugs of a resume or a save, and whether the suite finds them: python -m tests.faults.bugs.

Each is put into the package by child.py.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megabyte_jax import checkpoint, manifest, training
from megabyte_jax.data import windows

MADE: dict[str, Any] = {}  # what a run was made of, for the bugs that need it


def _restored(change: Callable[[Any], Any]) -> None:
    """Changes the state that a restore returns."""
    restore, abstract_state = checkpoint.Checkpoints.restore, training.abstract_state

    def remembering(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        MADE.update(model=model, optimizer=optimizer)
        return abstract_state(model, optimizer, *args, **kwargs)

    def broken(self: Any, like: Any) -> Any:
        found = restore(self, like)
        if not found:
            return found
        MADE.update(like=like, start=int(found[0].step))
        return change(found[0]), found[1]

    training.abstract_state = remembering
    checkpoint.Checkpoints.restore = broken  # type: ignore[method-assign]


def _weights_not_restored() -> None:
    def change(state: Any) -> Any:
        fresh = training.init_state(MADE["model"], MADE["optimizer"], 0, MADE["like"])
        return state._replace(params=fresh.params)

    _restored(change)


def _moments_lost() -> None:
    def zero(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    _restored(lambda state: state._replace(opt_state=jax.tree.map(zero, state.opt_state)))


def _optimizer_lost() -> None:
    _restored(lambda state: state._replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state)))


def _through_bfloat16() -> None:
    def cut(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16).astype(x.dtype)

    _restored(lambda state: state._replace(params=jax.tree.map(cut, state.params)))


def _batches(change: Callable[[int], int]) -> None:
    """Takes other batches in a run that resumed."""
    _restored(lambda state: state)
    prefetch = windows.prefetch

    def broken(fn: Any, items: Any, workers: int) -> Any:
        return prefetch(fn, (change(i) if "start" in MADE else i for i in items), workers)

    windows.prefetch = broken


def _data_restarted() -> None:
    _batches(lambda i: i - MADE["start"])


def _batch_repeated() -> None:
    _batches(lambda i: i - 1)


def _batch_skipped() -> None:
    _batches(lambda i: i + 1)


def _dropout_restarted() -> None:
    _restored(lambda state: state)
    fold_in = jax.random.fold_in
    jax.random.fold_in = lambda key, data: fold_in(key, data - MADE.get("start", 0))


def _digests_not_checked() -> None:
    manifest.verify = lambda checkpoint, digests: None


def _failure_announced_as_saved() -> None:
    def broken(self: Any, step: int, error: Exception) -> None:
        self.step = step
        print(f"update {step}: checkpoint saved and verified", file=sys.stderr)

    checkpoint.Checkpoints._fail = broken  # type: ignore[method-assign]


class Bug(NamedTuple):
    """A bug.

    Attributes:
        apply: puts it into the package.
        found_by: the lane that fails on it.
        is_in_readers: whether it is to be put into this process too, for good.
    """

    apply: Callable[[], None]
    found_by: str = "SIGKILL in a save"
    is_in_readers: bool = False


BUGS = {
    "weights_not_restored": Bug(_weights_not_restored),
    "moments_lost": Bug(_moments_lost),
    "optimizer_state_lost": Bug(_optimizer_lost),
    "data_restarted": Bug(_data_restarted),
    "batch_repeated": Bug(_batch_repeated),
    "batch_skipped": Bug(_batch_skipped),
    "dropout_restarted": Bug(_dropout_restarted),
    "weights_through_bfloat16": Bug(_through_bfloat16),
    "failed_save_announced": Bug(_failure_announced_as_saved, "full disk"),
    "digests_not_checked": Bug(_digests_not_checked, "damaged checkpoint files", True),
}


def main() -> None:
    """Runs all these lanes without a bug, and the lane of each bug with it, as `make test` does."""
    from tests import conftest  # noqa: F401  # says how JAX is to run, here and not in child.py
    from tests.faults.lanes import LANES

    wrong = 0
    for name in ["", *BUGS]:
        os.environ["MEGABYTE_BUG"] = name  # for the processes that train
        lanes = {BUGS[name].found_by} if name else {bug.found_by for bug in BUGS.values()}
        if name and BUGS[name].is_in_readers:
            BUGS[name].apply()
        for lane in (lane for lane in LANES if lane.name in lanes):
            with tempfile.TemporaryDirectory() as scratch:
                lost = lane.run(Path(scratch), lane.fast, 0).lost
            wrong += bool(lost) != bool(name)
            found = f"lost {len(lost)} of {lane.fast}"
            print(f"{name or 'no bug':26} {lane.name:26} {found}", flush=True)
    print(f"{wrong} of these are not as they should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
