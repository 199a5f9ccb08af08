"""Which mesh is best for a config, and what makes one fit that does not: tried by compiling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from megabyte_jax import run_config, sharding, training
from megabyte_jax.errors import PlanError, UserError
from megabyte_jax.models.config import MegabyteConfig, ModelConfig
from megabyte_jax.optimizer import make_optimizer, make_schedule
from megabyte_jax.planning import plan as plans
from megabyte_jax.planning import roofline
from megabyte_jax.planning import step as steps
from megabyte_jax.planning.estimate import Estimate, estimate
from megabyte_jax.planning.plan import Plan, flags
from megabyte_jax.planning.step import Step, TooLargeError, progress
from megabyte_jax.planning.topology import GIB, LOCAL, Topology, slices

Changes = dict[str, Any]


def divisors(n: int) -> list[int]:
    """All of them, in order."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def meshes(num_devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of a number of devices."""
    for sizes in itertools.product(divisors(num_devices), repeat=len(sharding.AXES) - 1):
        if num_devices % math.prod(sizes) == 0:
            yield dict(zip(sharding.AXES, (num_devices // math.prod(sizes), *sizes), strict=True))


def candidates(config: ConfigDict, model: ModelConfig, num_devices: int) -> list[Changes]:
    """Meshes and numbers of parts of a batch that the model and the batch can be divided by."""
    found = []
    for mesh in meshes(num_devices):
        for parts in divisors(config.train.batch_size):
            try:
                sharding.check(mesh, model, config.train.batch_size, parts)
            except UserError:
                continue
            found.append(
                {f"mesh.{axis}": size for axis, size in mesh.items()}
                | {"train.grad_accumulation": parts}
            )
    return found


def search(
    config: ConfigDict, topology: Topology, devices: list[Any], max_compiles: int
) -> list[tuple[str, Plan]]:
    """Compiles the most promising candidates.

    Args:
        config: of the run.
        topology: that is planned for.
        devices: its devices.
        max_compiles: how many candidates are compiled.

    Returns:
        Flags and plans of those that fit, the fastest first.

    Raises:
        PlanError: none of them fits.
        UserError: the config is wrong, or nothing divides model and batch.
    """
    model = run_config.validate(config)
    rates = roofline.rates(topology, model.dtype)
    found = candidates(config, model, len(devices))
    if not found:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: no mesh of {len(devices)} devices "
            "divides it and the model; accepted is a batch with more divisors in common with them"
        )
    ranked = _ranked(config, model, found, topology, rates)
    progress(
        f"{len(found)} ways to divide model and batch, of which {len(ranked)} can hold the "
        f"parameters; compiling the best {min(max_compiles, len(ranked))} by formula"
    )
    fitting = []
    for number, changes in enumerate(ranked[:max_compiles], 1):
        label = f"{number}/{min(max_compiles, len(ranked))} {flags(changes)}"
        try:
            step = steps.make(steps.changed(config, changes), topology, devices)
            fitting.append((flags(changes), plans.make(step, rates, label)))
        except TooLargeError as error:
            progress(f"{label}: does not fit, {error.required / GIB:.1f} GiB at least")
    if not fitting:
        raise PlanError(
            f"--topology={topology.name}: none of the {min(max_compiles, len(ranked))} best of "
            f"{len(found)} meshes fits; accepted is {larger(topology, 2)}, or more of them tried "
            "with --max_compiles"
        )
    return sorted(fitting, key=lambda pair: pair[1].times.apart)


def _ranked(
    config: ConfigDict,
    model: ModelConfig,
    found: list[Changes],
    topology: Topology,
    rates: roofline.Rates,
) -> list[Changes]:
    """Those whose state fits, the fastest by formula first, those that seem too large last."""
    schedule = make_schedule(config.optimizer, config.train, model.seq_len)
    optimizer = make_optimizer(config.optimizer, schedule)
    shapes = jax.eval_shape(lambda: training.init_state(model, optimizer, config.seed))
    limit = steps.available(topology)

    def of(changes: Changes) -> Estimate:
        mesh = {axis: changes[f"mesh.{axis}"] for axis in sharding.AXES}
        return estimate(steps.changed(config, changes), model, shapes, mesh, rates)

    estimates = [(of(changes), changes) for changes in found]
    fitting = [(e, changes) for e, changes in estimates if e.state_bytes < limit]
    fitting.sort(key=lambda pair: (pair[0].memory_bytes > limit, pair[0].seconds))
    return [changes for _, changes in fitting]


def explain(step: Step, error: TooLargeError, devices: list[Any], max_compiles: int) -> PlanError:
    """Finds out by compiling what would make a step fit.

    Args:
        step: that does not.
        error: by how much.
        devices: of its mesh.
        max_compiles: how many remedies are compiled.

    Returns:
        The error to raise: in one line what is too much and what would make it fit.
    """
    held, limit = steps.stored(step), error.available
    rest = max(0.0, error.required - held.on_device)
    state = held.parameters + held.optimizer
    what = "parameters and optimizer's state" if state > limit else "activations and temporaries"
    problem = (
        f"--topology={step.topology.name}: does not fit: at least {error.required / GIB:.2f} of "
        f"{limit / GIB:.2f} GiB per device, {(error.required - limit) / GIB:.2f} GiB too much, "
        f"most of it {what} (parameters {held.parameters / GIB:.2f}, optimizer's state "
        f"{held.optimizer / GIB:.2f}, batch {held.batch / GIB:.2f}, all else {rest / GIB:.2f})"
    )
    tried = 0
    for changes in remedies(step):
        if tried == max_compiles:
            break
        changed = steps.changed(step.config, changes)
        try:
            remedied = steps.make(changed, step.topology, devices)
        except UserError:
            continue
        if steps.stored(remedied).on_device > limit:
            continue
        tried += 1
        try:
            program, _ = steps.compiled(remedied, flags(changes))
        except TooLargeError as still:
            progress(f"{flags(changes)}: does not fit, {still.required / GIB:.1f} GiB at least")
            continue
        used = steps.memory_used(program) / GIB
        return PlanError(f"{problem}; fits with {flags(changes)} ({used:.2f} GiB, compiled)")
    hint = larger(step.topology, error.required / limit)
    return PlanError(
        f"{problem}; what was tried here ({tried} compiled) does not fit either; by formula needs "
        f"{hint}, or another mesh, which --search looks for"
    )


def remedies(step: Step) -> Iterator[Changes]:
    """What might make a step fit, what costs least first; each adds to the one before."""
    config, model, mesh = step.config, step.model, step.mesh.shape
    changes: Changes = {}
    if mesh["data"] > 1:
        changes |= {"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]}
        yield dict(changes)
    names = [name for name in config.model if hasattr(config.model[name], "remat")]
    kept = {f"model.{name}.remat": "full" for name in names if config.model[name].remat != "full"}
    if kept:
        changes |= kept
        yield dict(changes)
    if isinstance(model, MegabyteConfig):
        if size := _group_size(model, mesh):
            changes["model.group_size"] = size
            yield dict(changes)
    rows = mesh["data"] * mesh["fsdp"]
    parts = config.train.grad_accumulation
    for more in divisors(config.train.batch_size // rows):
        if more % parts == 0 and more > parts:
            changes["train.grad_accumulation"] = more
            yield dict(changes)
    if not config.optimizer.offload and step.topology.generation != LOCAL:
        yield changes | {"optimizer.offload": True}


def _group_size(model: MegabyteConfig, mesh: Mapping[str, int]) -> int:
    """Patches of a sixteenth of the sequence, or as near as divides; 0 if there is nothing less."""
    K, devices = model.seq_len // model.patch_size, mesh["sequence"]
    now = model.group_size or K
    sizes = [n for n in divisors(K) if n < now and n % devices == 0 and K // n % devices == 0]
    return min(sizes, key=lambda n: abs(math.log(n * 16 / now)), default=0)


def larger(topology: Topology, factor: float) -> str:
    """The smallest slice of a generation with `factor` times the chips."""
    if topology.generation == LOCAL:
        return f"{math.ceil(factor)} times the devices"
    sizes = [t for t in slices(topology.generation) if t.chips >= factor * topology.chips]
    if not sizes:
        return f"more than {topology.chip.max_chips} chips of {topology.generation}"
    return min(sizes, key=lambda t: t.chips).name
