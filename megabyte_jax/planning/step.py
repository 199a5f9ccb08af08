"""The train step of a config on a mesh of devices that need not be there, compiled."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from megabyte_jax import run_config, sharding, training
from megabyte_jax.errors import PlanError, UserError
from megabyte_jax.models.config import ModelConfig
from megabyte_jax.optimizer import make_optimizer, make_schedule, num_steps
from megabyte_jax.planning.topology import LOCAL, Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What the TPU compiler says when the temporaries alone are too many, and when it allocates all.
_TEMPORARIES = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)")
_ALLOCATED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


class TooLargeError(Exception):
    """A step needs more memory than a device has.

    Attributes:
        required: bytes, at least.
        available: bytes.
    """

    def __init__(self, required: float, available: float) -> None:
        super().__init__(f"{required:.0f} of {available:.0f} bytes")
        self.required = required
        self.available = available


@dataclass(frozen=True)
class Step:
    """A train step and what it takes, none of which exists.

    Attributes:
        config: it was made from, with the sizes of the mesh filled in.
        topology: of the devices.
        model: the model's config.
        mesh: of the devices.
        state: the train state, as shapes and places.
        batch: uint8 [B, T], as shape and place.
        update: jitted, of state and batch.
        num_steps: in the config's budget.
    """

    config: ConfigDict
    topology: Topology
    model: ModelConfig
    mesh: Mesh
    state: training.TrainState
    batch: jax.ShapeDtypeStruct
    update: Any
    num_steps: int


@dataclass(frozen=True)
class Stored:
    """Bytes that a device holds between updates, by shapes and places.

    Attributes:
        parameters: of the model.
        optimizer: the optimizer's state, but for what lies in the memory of the hosts.
        batch: the bytes of its share of a batch.
    """

    parameters: float
    optimizer: float
    batch: float

    @property
    def on_device(self) -> float:
        """Bytes in the device's own memory."""
        return self.parameters + self.optimizer + self.batch


def parse_mesh(text: str, config: ConfigDict) -> dict[str, int]:
    """Reads --mesh, as fsdp=8,tensor=2; what it does not name is as in `config.mesh`.

    Raises:
        UserError: it cannot be read.
    """
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    named: set[str] = set()
    for part in text.split(",") if text.strip() else []:
        axis, _, size = (word.strip() for word in part.partition("="))
        ok = axis in sizes and axis not in named and re.fullmatch(r"-1|[1-9]\d{0,6}", size)
        if not ok:
            raise UserError(
                f"--mesh={text}: {part.strip()!r} cannot be used; accepted are "
                f"{', '.join(sharding.AXES)}, each once, with a number of devices or -1, such as "
                "fsdp=8,tensor=2"
            )
        named.add(axis)
        sizes[axis] = int(size)
    return sizes


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with some keys changed, as {"train.batch_size": 8}."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(changes))
    return config


def make(config: ConfigDict, topology: Topology, devices: list[Any]) -> Step:
    """Makes the step of a config, as train.py does.

    Args:
        config: as `configs/base.py` declares it.
        topology: that is planned for.
        devices: its devices.

    Raises:
        UserError: the config is wrong, or the mesh does not fit the devices, model or batch.
    """
    model = run_config.validate(config)
    sizes = sharding.mesh_shape(config.mesh, len(devices))
    config = changed(config, {f"mesh.{axis}": size for axis, size in sizes.items()})
    train = config.train
    sharding.check(sizes, model, train.batch_size, train.grad_accumulation)
    mesh = sharding.make_mesh(sizes, devices)
    schedule = make_schedule(config.optimizer, train, model.seq_len)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = training.abstract_state(model, optimizer, mesh, offload=config.optimizer.offload)
    update = training.make_train_step(
        model, optimizer, schedule, config.seed, train.grad_accumulation, like=state
    )
    batch = jax.ShapeDtypeStruct(
        (train.batch_size, model.seq_len), jnp.uint8, sharding=sharding.batch_sharding(mesh)
    )
    steps = num_steps(train, model.seq_len)
    return Step(config, topology, model, mesh, state, batch, update, steps)


def stored(step: Step) -> Stored:
    """What a device holds between updates."""

    def count(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
            if x.sharding.memory_kind != "pinned_host"  # where `offload` puts it
        )

    return Stored(count(step.state.params), count(step.state.opt_state), count(step.batch))


def available(topology: Topology) -> float:
    """Bytes of memory of a device that a program may use."""
    if topology.generation != LOCAL:
        return topology.chip.hbm / topology.chip.devices
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / jax.local_device_count()


def compiled(step: Step, label: str) -> tuple[Any, float]:
    """Compiles a step.

    Args:
        step: the step.
        label: what of it, for the progress told on stderr.

    Returns:
        The compiled program and how many seconds that took.

    Raises:
        TooLargeError: it does not fit, as far as the compiler or its account of memory says.
        PlanError: something else is too large for the devices.
    """
    where = f"for {step.topology.name}, which takes minutes if the model is large"
    progress(f"compiling {label} {where} ...")
    start = time.perf_counter()
    try:
        with jax.set_mesh(step.mesh):
            program = step.update.lower(step.state, step.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(step, str(error)) from None
    seconds = time.perf_counter() - start
    progress(f"compiled {label} in {seconds:.0f} s")
    # The compiler looks at temporaries alone and not at the arguments beside them.
    used, limit = memory_used(program), available(step.topology)
    if used > limit:
        raise TooLargeError(used, limit)
    return program, seconds


def progress(text: str) -> None:
    """Tells what goes on, on stderr, for stdout holds the plan."""
    print(text, file=sys.stderr, flush=True)


def _too_large(step: Step, message: str) -> Exception:
    """The error that says by how much."""
    held = stored(step).on_device
    for pattern, beside in ((_TEMPORARIES, held), (_ALLOCATED, 0)):
        if match := pattern.search(message):
            size, unit, limit, unit_of_limit = match.groups()
            required = float(size) * _UNITS[unit] + beside
            return TooLargeError(required, float(limit) * _UNITS[unit_of_limit])
    return PlanError(f"the compiler found too little memory: {message.splitlines()[0]}")


def memory_used(program: Any) -> float:
    """Bytes of a device's memory that a compiled program needs."""
    sizes = program.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
    )
