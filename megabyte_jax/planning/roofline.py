"""How fast a step can be at best: the time of its products, of its memory and of its collectives.

These are bounds and no promises: no device reaches all its datasheet says, and what does not
overlap adds up.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megabyte_jax import flops
from megabyte_jax.models.config import (
    VOCAB_SIZE,
    ByteTransformerConfig,
    MegabyteConfig,
    ModelConfig,
    TransformerConfig,
)
from megabyte_jax.planning.cost import Collective, Cost
from megabyte_jax.planning.topology import CHIPS, LOCAL, Topology


class Rates(NamedTuple):
    """What a device can do, per second.

    Attributes:
        flops: FLOPs of products.
        memory: bytes read from and written to its memory.
        link: bytes over one link to a neighbour, in one direction; None if it is not known.
        source: where these come from.
    """

    flops: float
    memory: float
    link: float | None
    source: str


class Times(NamedTuple):
    """Seconds of a step if each were all there is to do.

    Attributes:
        compute: of the products.
        memory: of what is read from and written to memory.
        interconnect: of the collectives; None if the links are not known.
    """

    compute: float
    memory: float
    interconnect: float | None

    @property
    def seconds(self) -> float:
        """Of a step in which all three go on at the same time: the longest."""
        return max(self.compute, self.memory, self.interconnect or 0)

    @property
    def apart(self) -> float:
        """Of a step in which they wait for each other."""
        return self.compute + self.memory + (self.interconnect or 0)

    @property
    def bound(self) -> str:
        """Which of the three is the longest."""
        return max(self._fields, key=lambda name: getattr(self, name) or 0)


def rates(topology: Topology, dtype: str) -> Rates:
    """What a device of a slice can do by the datasheet, or one of this machine as measured.

    Args:
        topology: the slice.
        dtype: of the products that are measured.
    """
    generation = topology.generation
    if generation == LOCAL:
        kind = jax.devices()[0].device_kind
        generation = next((name for name, chip in CHIPS.items() if chip.kind == kind), LOCAL)
    if generation == LOCAL:
        # The devices of a CPU are parts of one.
        shared = jax.local_device_count() if jax.default_backend() == "cpu" else 1
        return Rates(flops.matmul_rate(dtype) / shared, _memory_rate() / shared, None, "measured")
    chip = CHIPS[generation]
    return Rates(
        chip.flops / chip.devices,
        chip.hbm_bandwidth / chip.devices,
        chip.link_bandwidth,
        f"datasheet of {generation}",
    )


def _memory_rate(seconds: float = 0.3) -> float:
    """Measures bytes per second read from and written to the default device's memory."""
    x = jnp.zeros(2**25 if jax.default_backend() == "cpu" else 2**28, jnp.float32)
    # In place: the first touch of new memory is slower than any after it.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(x))
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < end:
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        best = max(best, 2 * x.nbytes / (time.perf_counter() - start))
    return best


def links(coordinates: Sequence[Sequence[int]], topology: Topology) -> int:
    """Links over which each chip of a group can send at the same time, in one direction each.

    Two along an axis of the torus that the group fills and that is a ring, one along another: the
    chip at its end has no more. TensorCores of one chip have at least what all its links have.

    Args:
        coordinates: in the torus, of the devices of the group.
        topology: the slice they are of.
    """
    total = 0
    for axis, (size, ring) in enumerate(zip(topology.shape, topology.wraps(), strict=True)):
        extent = len({place[axis] for place in coordinates})
        if extent > 1:
            total += 2 if ring and extent == size else 1
    return total or 2 * len(topology.shape)


def seconds(collective: Collective, mesh: Any, topology: Topology, link: float) -> float:
    """Time of one collective over the links of its group.

    Args:
        collective: what is sent.
        mesh: whose devices it runs on.
        topology: the slice they are of.
        link: bytes per second of one link.
    """
    devices = mesh.devices.ravel()
    group = [devices[i] for i in collective.group or range(devices.size)]
    if collective.kind == "collective-permute":
        count = 1
    elif hasattr(group[0], "coords") and topology.shape:
        count = links([device.coords for device in group], topology)
    else:
        count = 1
    return collective.sent(devices.size) / (count * link)


def times(cost: Cost, mesh: Any, topology: Topology, rates: Rates) -> Times:
    """Times of a step.

    Args:
        cost: of the step on one device.
        mesh: it runs on.
        topology: of the mesh.
        rates: of a device.
    """
    interconnect = None
    if rates.link:
        interconnect = sum(
            count * seconds(collective, mesh, topology, rates.link)
            for collective, count in cost.collectives.items()
        )
    return Times(cost.flops / rates.flops, cost.memory_bytes / rates.memory, interconnect)


def executed_flops_per_byte(model: ModelConfig) -> float:
    """FLOPs of a training step per byte by formula, with what rematerialisation computes again.

    `full` computes each block again but for its last product, whose result nobody needs; `dots`
    only the scores and what they weigh; groups of patches the whole local model and the head.
    """
    total = flops.train_flops_per_byte(model)
    if isinstance(model, ByteTransformerConfig):
        return total + _again(model, "transformer", 1)
    P, D_L = model.patch_size, model.local_model.dim
    total += _again(model, "global_model", 1 / P) + _again(model, "local_model", 1)
    if model.group_size:
        head = 2 * D_L * (model.byte_dim + VOCAB_SIZE)
        total += _stage(model, "local_model") + head
    return total


def _stage(model: ModelConfig, name: str) -> float:
    """FLOPs of the forward pass of a stack, per byte."""
    stack: TransformerConfig = getattr(model, name)
    one_more: Any = {name: dataclasses.replace(stack, num_layers=stack.num_layers + 1)}
    deeper = flops.forward_flops_per_byte(dataclasses.replace(model, **one_more))
    return stack.num_layers * (deeper - flops.forward_flops_per_byte(model))


def _again(model: MegabyteConfig | ByteTransformerConfig, name: str, positions: float) -> float:
    """FLOPs of a stack that its rematerialisation computes again, per byte."""
    stack: TransformerConfig = getattr(model, name)
    if stack.remat == "none":
        return 0
    matrices = 3 if stack.activation == "swiglu" else 2
    attended, shared = (n * stack.head_width for n in (stack.num_heads, stack.kv_heads))
    kernels = 2 * stack.dim * (2 * (attended + shared) + matrices * stack.hidden_dim)
    layers = positions * stack.num_layers
    if stack.remat == "dots":
        return _stage(model, name) - layers * kernels
    return _stage(model, name) - layers * 2 * stack.dim * stack.hidden_dim
