"""Reads checkpoints: the newest that is what it was when it was saved."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from megabyte_jax import distributed, files, manifest
from megabyte_jax.errors import CheckpointError, UserError

# At every save Orbax warns that it found nothing to merge of the format that is not used here.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge" not in record.getMessage())

UNFINISHED = re.compile(r".*\.(orbax-checkpoint-tmp.*|deleted)")


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
    directory = workdir.absolute() / "checkpoints"
    there = directory.is_dir() and remains(directory)
    steps = steps_of(directory) if there else []
    if not there or (step is not None and step not in steps):
        raise UserError(
            f"--workdir={workdir}: has no checkpoint {'yet' if step is None else step}; "
            f"accepted is a trained run{f', with checkpoints {steps}' if steps else ''}"
        )
    while True:
        try:
            found, items, _ = restore_newest(directory, {"params": like}, step)
            return found, items["params"]
        except CheckpointError:
            # A run that trains removes old ones, and has newer ones then.
            before, steps = steps, steps_of(directory)
            if step is not None or steps == before:
                raise


def restore_newest(
    directory: Path,
    like: dict[str, Any],
    only: int | None = None,
    require: Callable[[Mapping[str, Any]], None] = lambda body: None,
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Restores the newest checkpoint that is what it was when it was saved; says which are not.

    Args:
        directory: of the checkpoints.
        like: name to tree of arrays, or their shapes, types and places; of what is to be restored.
        only: the step of the one that will do; None for any.
        require: raises a CheckpointError for a manifest that will not do.

    Returns:
        Its step, the items and its manifest.

    Raises:
        CheckpointError: none of them can be used.
    """
    found = steps_of(directory)
    steps = [only] if only is not None else found[::-1]
    for step in steps:
        restored = None
        try:
            restored = _restore(directory / str(step), like, require)
        # Orbax raises many types, the bare Exception among them, on a damaged checkpoint.
        except Exception as error:
            files.say(f"checkpoint {step} cannot be read: {reason(error)}")
        if distributed.anywhere(restored is None) or restored is None:  # then no process uses it
            continue
        if step != steps[0] and distributed.is_primary():
            files.say(f"checkpoint {step} is used instead")
        return step, *restored
    others = sorted({path.name for path in directory.iterdir()} - {str(step) for step in found})
    raise CheckpointError(
        f"{directory}: none of the checkpoints {steps} can be read"
        + (f"; {' '.join(others[:5])} there are no checkpoints" if others else "")
    )


def _restore(
    path: Path, like: dict[str, Any], require: Callable[[Mapping[str, Any]], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items of a checkpoint, of which each process verifies its part before reading them."""
    error = None
    try:
        if path.is_symlink() or not path.is_dir():
            raise CheckpointError("it is no directory, or a symbolic link")
        body = manifest.read(path, like)
        require(body)
        names = sorted(name for name in body["digests"] if name.partition("/")[0] in like)
        mine = names[jax.process_index() :: jax.process_count()]
        manifest.verify(path, {name: body["digests"][name] for name in mine})
    except (CheckpointError, OSError) as failure:
        error = failure
    # Reading it is done by all processes or by none.
    if distributed.anywhere(error is not None):
        raise error or CheckpointError("another process found it damaged")
    target = jax.tree.map(_placed, like)
    arguments = {
        name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
        for name, tree in target.items()
    }
    with checkpointer() as reader, no_traceback_of_tasks_given_up():
        restored = reader.restore(path, args=ocp.args.Composite(**arguments))
    return {name: restored[name] for name in like}, body


def checkpointer() -> ocp.AsyncCheckpointer:
    """Orbax's, which writes each shard of an array to a file of its plain bytes.

    `manifest` relies on that.
    """
    whole_shards = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, whole_shards))
    arrays = {
        name: ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_compression=False, type_handler_registry=registry
        )
        for name in ("params", "opt_state")
    }
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(**arrays, manifest=ocp.JsonCheckpointHandler())
    )


def steps_of(directory: Path) -> list[int]:
    """Steps of what may be a checkpoint in a directory, in order."""
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if re.fullmatch(r"0|[1-9][0-9]{0,18}", path.name)
    )


def remains(directory: Path) -> bool:
    """Whether anything but saves that never ended is in a directory."""
    return any(not UNFINISHED.fullmatch(path.name) for path in directory.iterdir())


def reason(error: Exception) -> str:
    """One line of what went wrong, without all that Orbax and TensorStore add to it."""
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def no_traceback_of_tasks_given_up() -> Iterator[None]:
    """Inside, what Orbax leaves behind when a task fails is not printed.

    That is dozens of others, which then find its event loop closed.
    """
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
