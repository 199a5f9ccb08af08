"""The plan of a run: what a compiled train step needs and how fast it can be, as figures."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from megabyte_jax import flops
from megabyte_jax.planning import cost, hlo, roofline
from megabyte_jax.planning import step as steps
from megabyte_jax.planning.cost import Cost
from megabyte_jax.planning.roofline import Rates, Times
from megabyte_jax.planning.step import Step
from megabyte_jax.planning.topology import LOCAL

DAY = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The collectives of one kind over the same axes of the mesh, of one update.

    Attributes:
        kind: all-gather, reduce-scatter, ...
        axes: of the mesh, joined by +.
        count: how many run.
        sent_bytes: by each device.
        seconds: over its links at best; None if they are not known.
    """

    kind: str
    axes: str
    count: int
    sent_bytes: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs. Memory, FLOPs and traffic are those of one device and one update.

    Attributes:
        topology: as libtpu spells it, or local.
        product: its name at Google, which may count TensorCores; the kind of device, if local.
        chips: of the slice; None if local.
        devices: in the mesh.
        mesh: size of each axis.
        batch_size: B, sequences of an update.
        seq_len: T in bytes.
        grad_accumulation: parts of a batch.
        num_steps: updates of the budget.
        num_parameters: of the model.
        compile_seconds: that compiling took.
        memory_bytes: by kind, with `total` and `available`.
        host_bytes: of the optimizer's state in the hosts' memory.
        stored_bytes: parameters, optimizer's state and batch by shapes and places alone.
        argument_bytes: the same as the compiler counts it.
        flops_per_byte: by formula, with what rematerialisation computes again, and as compiled.
        traffic_bytes: read from and written to the device's memory.
        transfer_bytes: moved between device and host.
        collectives: by kind and axes, the longest first.
        times: of the roofline.
        compiler_seconds: the compiler's estimate of all but the collectives, if it has one.
        rates: that the times are of.
        notes: what the figures leave out.
    """

    topology: str
    product: str
    chips: int | None
    devices: int
    mesh: dict[str, int]
    batch_size: int
    seq_len: int
    grad_accumulation: int
    num_steps: int
    num_parameters: int
    compile_seconds: float
    memory_bytes: dict[str, float]
    host_bytes: float
    stored_bytes: float
    argument_bytes: float
    flops_per_byte: dict[str, float]
    traffic_bytes: float
    transfer_bytes: float
    collectives: list[Exchange]
    times: Times
    compiler_seconds: float | None
    rates: Rates
    notes: list[str]

    @property
    def bytes_per_second(self) -> float:
        """Of training, by the roofline."""
        return self.batch_size * self.seq_len / self.times.seconds

    @property
    def days(self) -> float:
        """That the budget takes, by the roofline."""
        return self.num_steps * self.times.seconds / DAY

    @property
    def chip_hours(self) -> float:
        """That the budget takes, by the roofline; of devices, if local."""
        return (self.chips or self.devices) * self.days * 24

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self) | {
            "times": self.times._asdict()
            | {"seconds": self.times.seconds, "apart": self.times.apart, "bound": self.times.bound},
            "rates": self.rates._asdict(),
            "bytes_per_second": self.bytes_per_second,
            "days": self.days,
            "chip_hours": self.chip_hours,
        }


def make(step: Step, rates: Rates, label: str = "the train step") -> Plan:
    """Compiles a step and reads the plan from it.

    Args:
        step: the step.
        rates: of its devices.
        label: what of it, for the progress told on stderr.

    Raises:
        TooLargeError: it does not fit.
    """
    program, seconds = steps.compiled(step, label)
    parsed = hlo.parse(program.as_text())
    counted, arguments = cost.of(parsed), _arguments(parsed)
    topology, train, model = step.topology, step.config.train, step.model
    stored, devices = steps.stored(step), step.mesh.size
    local = topology.generation == LOCAL
    sizes = program.memory_analysis()
    memory = {
        "parameters": arguments["state.params"],
        "optimizer's state": arguments["state.opt_state"],
        "batch": arguments["batch"],
        "gradients, activations and other temporaries": sizes.temp_size_in_bytes,
        "results that take no argument's place": max(
            0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        ),
        "program": sizes.generated_code_size_in_bytes,
        "total": steps.memory_used(program),
        "available": steps.available(topology),
    }
    per_byte = devices / (train.batch_size * model.seq_len)
    return Plan(
        topology=topology.name,
        product=step.mesh.devices.flat[0].device_kind if local else topology.product,
        chips=None if local else topology.chips,
        devices=devices,
        mesh={axis: int(size) for axis, size in step.mesh.shape.items()},
        batch_size=train.batch_size,
        seq_len=model.seq_len,
        grad_accumulation=train.grad_accumulation,
        num_steps=step.num_steps,
        num_parameters=flops.num_parameters(model),
        compile_seconds=seconds,
        memory_bytes=memory,
        host_bytes=arguments["host"],
        stored_bytes=stored.on_device,
        argument_bytes=sizes.argument_size_in_bytes,
        flops_per_byte={
            "formula": flops.train_flops_per_byte(model),
            "with rematerialisation": roofline.executed_flops_per_byte(model),
            "compiled": counted.flops * per_byte,
        },
        traffic_bytes=counted.memory_bytes,
        transfer_bytes=counted.host_bytes,
        collectives=_exchanges(step, counted, rates),
        times=roofline.times(counted, step.mesh, topology, rates),
        compiler_seconds=_compiler_seconds(step, counted),
        rates=rates,
        notes=_notes(step, counted),
    )


def _arguments(program: hlo.Program) -> dict[str, float]:
    """Bytes of what the step is given, by the names it has in `training.make_train_step`.

    As the compiler lays it out: on TPU small arrays are larger than their elements.
    """
    sizes = dict.fromkeys(("state.params", "state.opt_state", "batch", "host"), 0.0)
    for x in program.computations[program.entry].instructions.values():
        name = re.search(r'op_name="([\w.]+)', x.attributes)
        if x.opcode == "parameter" and name and name[1] in sizes:
            (array,) = x.results
            kind = "host" if array.space == cost.HOST else name[1]
            sizes[kind] += array.stored_bytes
    return sizes


def _exchanges(step: Step, counted: Cost, rates: Rates) -> list[Exchange]:
    """Sums the collectives by kind and axes of the mesh."""
    shape, axes = tuple(step.mesh.shape.values()), tuple(step.mesh.shape)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    for collective, count in counted.collectives.items():
        places = np.unravel_index(list(collective.group) or range(step.mesh.size), shape)
        names = [axis for axis, place in zip(axes, places, strict=True) if len(set(place)) > 1]
        total = sums[collective.kind, "+".join(names)]
        total[0] += count
        total[1] += count * collective.sent(step.mesh.size)
        if rates.link:
            time = roofline.seconds(collective, step.mesh, step.topology, rates.link)
            total[2] += count * time
    exchanges = [
        Exchange(kind, names, int(count), sent, seconds if rates.link else None)
        for (kind, names), (count, sent, seconds) in sums.items()
    ]
    return sorted(exchanges, key=lambda x: (-(x.seconds or 0), -x.sent_bytes))


def _compiler_seconds(step: Step, counted: Cost) -> float | None:
    clock = None if step.topology.generation == LOCAL else step.topology.chip.clock
    return counted.cycles / clock if clock and counted.cycles else None


def _notes(step: Step, counted: Cost) -> list[str]:
    notes = []
    if counted.unknown_loops:
        loops = ", ".join(sorted(counted.unknown_loops))
        notes.append(f"counted once, for nothing says how often they run: the loops {loops}")
    if kernels := sum(counted.kernels.values()):
        notes.append(f"without the FLOPs of {kernels} runs of custom kernels, which are not seen")
    if step.topology.generation == LOCAL and step.mesh.size > 1:
        notes.append("without the time of the collectives, for the links are not known")
    return notes


def flags(changes: Mapping[str, Any]) -> str:
    """Changes of config keys as they are given on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
