"""What a compiled program costs one device: products, memory traffic and collectives.

The compiler's own analysis counts the body of a loop once; here it counts as often as it runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from megabyte_jax.planning import loops, products
from megabyte_jax.planning.groups import replica_group
from megabyte_jax.planning.hlo import Array, Computation, Instruction, Program

# What the n devices of a group send each, in units of (n - 1) / n of the collective's bytes.
COLLECTIVES = {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
    "collective-permute": 1,
}
HOST = 5  # memory space of the host
# These move nothing: names of parts of others, or what their computations are counted for.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier async-start async-update add-dependency domain".split()
)
# Of a large operand these touch only what they give.
_SLICES = ("dynamic-slice", "slice", "gather")
_KERNELS = r"^tpu_custom_call$|^__|triton"  # of Pallas, and of libraries
_BUFFERS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")


class Collective(NamedTuple):
    """A collective operation of a group of devices.

    Attributes:
        kind: a key of `COLLECTIVES`.
        num_bytes: of the whole array on one device: gathered, reduced, exchanged or sent.
        group: positions in the mesh of the devices that take part with the first; of a
            collective-permute sender and receiver. Empty: all of them.
    """

    kind: str
    num_bytes: float
    group: tuple[int, ...]

    def sent(self, num_devices: int) -> float:
        """Bytes that each device sends, at least; `num_devices` are all there are."""
        if self.kind == "collective-permute":
            return self.num_bytes
        n = len(self.group) or num_devices
        return COLLECTIVES[self.kind] * self.num_bytes * (n - 1) / n


@dataclass
class Cost:
    """What a program costs each device it runs on, once through.

    Attributes:
        flops: of its matrix products and convolutions.
        memory_bytes: read from and written to the device's main memory, taking it that a fusion
            reads what it is given once and that nothing stays on the chip unless it says so.
        host_bytes: moved between device and host.
        cycles: the compiler's estimate of all but the collectives; 0 where it has none.
        collectives: how often each runs.
        kernels: how often each custom kernel runs, whose FLOPs nobody can see from outside.
        unknown_loops: names of loops counted once because the text does not say how often they run.
    """

    flops: float = 0
    memory_bytes: float = 0
    host_bytes: float = 0
    cycles: float = 0
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds another program, run a number of times."""
        for name in ("flops", "memory_bytes", "host_bytes", "cycles"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += times * count
        self.unknown_loops |= other.unknown_loops


def of(program: Program) -> Cost:
    """Counts a program."""
    begun = {
        channel
        for computation in program.computations.values()
        if _begins(computation)
        for x in computation.instructions.values()
        if (channel := _channel(x))
    }
    return _of(program, program.computations[program.entry], begun)


def _of(program: Program, where: Computation, begun: set[str]) -> Cost:
    cost = Cost()
    for x in where.instructions.values():
        if x.opcode == "while":
            times = loops.trip_count(program, where, x)
            if times is None:
                cost.unknown_loops.add(x.name)
            (body,) = x.called("body")
            inside = _of(program, program.computations[body], begun)
            cost.add(inside, 1 if times is None else times)
        elif x.opcode in ("call", "async-start"):
            for name in x.called("to_apply", "calls"):
                cost.add(_of(program, program.computations[name], begun))
        elif x.opcode == "conditional":
            names = x.called("branch_computations", "true_computation", "false_computation")
            branches = [_of(program, program.computations[name], begun) for name in names]
            cost.add(max(branches, key=lambda c: (c.flops, c.memory_bytes), default=Cost()))
        else:
            _add_instruction(cost, program, where, x, begun)
    return cost


def _begins(computation: Computation) -> bool:
    """Whether a fusion begins a collective that others, in inner loops too, carry on and end."""
    return any("AsyncCollectiveStart" in x.attributes for x in computation.instructions.values())


def _channel(x: Instruction) -> str:
    """What all parts of a collective have in common."""
    match = re.search(r"channel_id=\d+", x.attributes)
    return match[0] if match and x.opcode.removesuffix("-start") in COLLECTIVES else ""


def _add_instruction(
    cost: Cost, program: Program, where: Computation, x: Instruction, begun: set[str]
) -> None:
    for inner, y in _within(program, where, x):
        if y.opcode == "dot":
            cost.flops += products.dot_flops(inner, y)
        elif y.opcode == "convolution":
            cost.flops += products.convolution_flops(inner, y)
        elif y.opcode.removesuffix("-start") in COLLECTIVES:
            if _channel(y) in begun and not _begins(inner):
                continue
            scattered = inner.name.startswith("all-reduce-scatter")
            cost.collectives[_collective(inner, y, scattered)] += 1
            _add_traffic(cost, [*_inputs(inner, y), *y.results[-1:]])
    if x.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
        name = target[1] if target else ""
        if name in _BUFFERS:
            return
        flops = products.library_flops(where, x)
        cost.flops += flops or 0
        if flops is None and re.search(_KERNELS, name):
            cost.kernels[name] += 1
    if match := re.search(r'"estimated_cycles":"(\d+)"', x.attributes):
        cost.cycles += int(match[1])
    _add_traffic(cost, _traffic(program, where, x))


def _within(
    program: Program, where: Computation, x: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or all of those that a fusion is made of, with where they stand."""
    if x.opcode != "fusion":
        yield where, x
        return
    for name in x.called("calls"):
        inner = program.computations[name]
        for y in inner.instructions.values():
            yield from _within(program, inner, y)


def _inputs(where: Computation, x: Instruction) -> list[Array]:
    return [array for name in x.operands for array in where.instructions[name].results]


def _collective(where: Computation, x: Instruction, scattered: bool) -> Collective:
    kind = x.opcode.removesuffix("-start")
    inputs = _inputs(where, x)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", x.attributes)
        ends = re.findall(r"(\d+),(\d+)", pairs[1] if pairs else "")
        moved = (tuple(map(int, pair)) for pair in ends if pair[0] != pair[1])
        return Collective(kind, inputs[0].num_bytes, next(moved, ()))
    group = replica_group(x.attributes)
    num_bytes = sum(array.num_bytes for array in inputs)
    if kind == "all-gather":
        first = sum(array.num_bytes for array in x.results[-len(inputs) :])
        num_bytes = num_bytes * len(group) if group else first
    return Collective("reduce-scatter" if scattered else kind, num_bytes, group)


def _add_traffic(cost: Cost, arrays: list[Array]) -> None:
    for array in arrays:
        if array.space == 0:
            cost.memory_bytes += array.num_bytes
        elif array.space == HOST:
            cost.host_bytes += array.num_bytes


def _traffic(program: Program, where: Computation, x: Instruction) -> list[Array]:
    """What an instruction reads and writes; collectives are counted where they are found."""
    kind = x.opcode
    if kind in _FREE or kind.endswith("-done") or kind.removesuffix("-start") in COLLECTIVES:
        return []
    inputs = _inputs(where, x)
    if kind in ("copy-start", "slice-start"):  # results: (to, from, ...) and (from, to, ...)
        to = x.results[0] if kind == "copy-start" else x.results[1]
        return [to, inputs[0]._replace(dtype=to.dtype, shape=to.shape)]
    if kind in _SLICES:
        return [x.results[0], inputs[0]._replace(shape=x.results[0].shape)]
    if kind == "dynamic-update-slice":
        return [inputs[1], inputs[0]._replace(shape=inputs[1].shape)]
    if kind != "fusion":
        return [*inputs, *x.results]
    fused = program.computations[x.called("calls")[0]]
    moved = _written(program, fused, fused.root)
    for number, name in enumerate(x.operands):
        for array in where.instructions[name].results[:1]:
            parts = _read(program, fused, fused.parameters[number])
            moved += [array] if parts is None else [p._replace(space=array.space) for p in parts]
    return moved


def _read(program: Program, fused: Computation, name: str) -> list[Array] | None:
    """The parts of an operand that a fusion reads; None for the whole of it."""
    parts: list[Array] = []
    for user in fused.users[name]:
        first = user.operands[0] == name
        if user.opcode in _SLICES and first:
            parts += user.results
        elif user.opcode == "dynamic-update-slice" and first:
            pass
        elif user.opcode == "tuple" or user.opcode.removesuffix("-start") in COLLECTIVES:
            pass
        elif user.opcode == "custom-call" and "AsyncCollective" in user.attributes:
            pass
        elif user.opcode == "bitcast":
            inner = _read(program, fused, user.name)
            if inner is None:
                return None
            parts += inner
        elif user.opcode == "fusion":
            nested = program.computations[user.called("calls")[0]]
            inner = _read(program, nested, nested.parameters[user.operands.index(name)])
            if inner is None:
                return None
            parts += inner
        else:
            return None
    return parts


def _written(program: Program, fused: Computation, name: str) -> list[Array]:
    """The parts of its results that a fusion writes."""
    x = fused.instructions[name]
    if x.opcode == "tuple":
        return [part for operand in x.operands for part in _written(program, fused, operand)]
    if x.opcode == "parameter" or x.opcode.removesuffix("-start") in COLLECTIVES:
        return []
    if x.opcode == "custom-call" and "AsyncCollective" in x.attributes:
        return []
    source = fused.instructions[x.operands[0]] if x.opcode == "bitcast" else x
    if source.opcode == "dynamic-update-slice":
        update = fused.instructions[source.operands[1]].results[0]
        return [update._replace(space=x.results[0].space)]
    if source.opcode == "fusion":
        nested = program.computations[source.called("calls")[0]]
        if nested.instructions[nested.root].opcode == "dynamic-update-slice":
            return _written(program, nested, nested.root)
    return list(x.results)
