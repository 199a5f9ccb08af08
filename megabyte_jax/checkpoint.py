"""Checkpoints of a run in its work directory, through Orbax."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from megabyte_jax import distributed
from megabyte_jax.errors import CheckpointError, UserError
from megabyte_jax.training import TrainState


def open_manager(workdir: Path, checkpoint: Any) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run to read and write; saves are asynchronous.

    Args:
        workdir: the work directory.
        checkpoint: `config.checkpoint`, which says how many are kept.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=checkpoint.keep,
        keep_period=checkpoint.keep_interval or None,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Starts saving a state under its step; the state may be donated as soon as this returns.

    Args:
        manager: of the run.
        state: after an update.
    """
    items = {
        "params": ocp.args.StandardSave(state.params),
        "opt_state": ocp.args.StandardSave(state.opt_state),
    }
    manager.save(int(state.step), args=ocp.args.Composite(**items))


def restore_state(manager: ocp.CheckpointManager, like: TrainState) -> TrainState | None:
    """Restores the newest state that can be read, and puts newer ones aside, renamed.

    The run makes those again; where they were they would stand in the way of that.

    Args:
        manager: of the run.
        like: a state of the same shapes and types, which lies where the restored one is to lie: as
            `training.abstract_state` gives it, on any mesh.

    Returns:
        The state, or None if the run has no checkpoint.

    Raises:
        CheckpointError: none of the checkpoints there are can be read.
    """
    if not manager.all_steps():
        return None
    step, items = _restore_newest(manager, {"params": like.params, "opt_state": like.opt_state})
    damaged = [saved for saved in manager.all_steps() if saved > step]
    with distributed.together():
        for newer in damaged if distributed.is_primary() else ():
            folder = Path(manager.directory)
            (folder / str(newer)).rename(folder / f"{newer}.damaged.{time.time_ns()}")
    manager.reload()
    count = jax.device_put(np.int32(step), like.step.sharding)
    return TrainState(count, items["params"], items["opt_state"])


def restore_params(workdir: Path, like: Any, step: int | None = None) -> tuple[int, Any]:
    """Restores the parameters alone, as evaluation and generation need them.

    Args:
        workdir: of the run.
        like: parameters, or their shapes, types and places.
        step: which checkpoint; None for the newest that can be read.

    Returns:
        The checkpoint's step and the parameters.

    Raises:
        UserError: the run has no such checkpoint.
        CheckpointError: none of the checkpoints can be read.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir}: has no checkpoint yet; accepted is a trained run")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"--workdir={workdir}: has no checkpoint {'yet' if step is None else step}; "
                f"accepted is a trained run{f', with checkpoints {sorted(steps)}' if steps else ''}"
            )
        found, items = _restore_newest(manager, {"params": like}, step)
    return found, items["params"]


def _restore_newest(
    manager: ocp.CheckpointManager, like: dict[str, Any], only: int | None = None
) -> tuple[int, dict[str, Any]]:
    target = jax.tree.map(_placed, like)
    args = ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in target.items()})
    steps = [only] if only is not None else sorted(manager.all_steps(), reverse=True)
    for step in steps:
        items = None
        try:
            with _no_traceback_of_reads_given_up():
                restored = manager.restore(step, args=args)
            items = {name: restored[name] for name in like}
        # Orbax raises many types, the bare Exception among them, on a damaged checkpoint.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"checkpoint {step} cannot be read: {reason}", file=sys.stderr)
        if distributed.anywhere(items is None) or items is None:  # then no process uses it
            continue
        if step != steps[0] and distributed.is_primary():
            print(f"checkpoint {step} is used instead", file=sys.stderr)
        return step, items
    raise CheckpointError(f"{manager.directory}: none of the checkpoints {steps} can be read")


@contextlib.contextmanager
def _no_traceback_of_reads_given_up() -> Iterator[None]:
    """When a read fails, Orbax leaves dozens behind that then find its event loop closed."""
    shown = sys.unraisablehook

    def hook(problem: sys.UnraisableHookArgs) -> None:
        if str(problem.exc_value) != "Event loop is closed":
            shown(problem)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        time.sleep(0.2)  # they end in threads of their own
        raise
    finally:
        sys.unraisablehook = shown


def _placed(x: Any) -> jax.ShapeDtypeStruct:
    """The place an array is restored to: where `like` says it lies, or on the first device."""
    place = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
