"""Memory and time of a step by formula, in a moment: which meshes are worth compiling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from megabyte_jax import flops, sharding, training
from megabyte_jax.models.config import (
    VOCAB_SIZE,
    MegabyteConfig,
    ModelConfig,
    TransformerConfig,
)
from megabyte_jax.planning import roofline
from megabyte_jax.planning.roofline import Rates

_LINKS = 2  # of an axis of the mesh, which this knows no better


@dataclass(frozen=True)
class Estimate:
    """Of a step on one device.

    Attributes:
        state_bytes: parameters and optimizer's state, exactly.
        memory_bytes: with gradients and, roughly, activations.
        seconds: of products and collectives, one after another, roughly.
    """

    state_bytes: float
    memory_bytes: float
    seconds: float


@dataclass(frozen=True)
class _Work:
    """A stack on one device, for one part of a batch: positions, keys of each, bytes that are kept.

    `kept` positions are those whose activations are held at the same time.
    """

    stack: TransformerConfig
    positions: float
    keys: int
    kept: float


def estimate(
    config: ConfigDict,
    model: ModelConfig,
    shapes: training.TrainState,
    mesh: Mapping[str, int],
    rates: Rates,
) -> Estimate:
    """Estimates a step.

    Args:
        config: of the run, for its batch.
        model: its model.
        shapes: of the train state.
        mesh: size of each axis.
        rates: of a device.
    """
    train, tensor = config.train, mesh["tensor"]
    sequences = train.batch_size / (mesh["data"] * mesh["fsdp"] * train.grad_accumulation)
    stacks = _stacks(model, sequences / mesh["sequence"])
    state = _stored(shapes, mesh)
    width = jnp.dtype(model.dtype).itemsize
    activations = sum(_activations(work, tensor, width) for work in stacks)
    logits = stacks[-1].kept * VOCAB_SIZE * 8  # and their gradient, float32
    gradients = 4 * flops.num_parameters(model) / (mesh["fsdp"] * tensor)
    total = roofline.executed_flops_per_byte(model) * train.batch_size * model.seq_len
    seconds = total / math.prod(mesh.values()) / rates.flops
    if rates.link:
        sent = _sent(model, stacks, mesh, width) * train.grad_accumulation
        seconds += sent / (_LINKS * rates.link)
    return Estimate(state, state + gradients + activations + logits, seconds)


def _stored(shapes: training.TrainState, mesh: Mapping[str, int]) -> float:
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    places = sharding.shardings(abstract, shapes)  # type: ignore[arg-type]
    sizes = jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, shapes, places
    )
    return sum(jax.tree.leaves(sizes))


def _stacks(model: ModelConfig, sequences: float) -> list[_Work]:
    T = model.seq_len
    if not isinstance(model, MegabyteConfig):
        return [_Work(model.transformer, sequences * T, model.window or T, sequences * T)]
    P = model.patch_size
    K, groups = T // P, T // P // model.group_size if model.group_size else 1
    return [
        _Work(model.global_model, sequences * K, K, sequences * K),
        _Work(model.local_model, sequences * T, P + model.previous, sequences * T / groups),
    ]


def _activations(work: _Work, tensor: int, width: int) -> float:
    """Bytes: the input of every block, and all of one block, or of all if none is recomputed."""
    stack = work.stack
    scores = stack.num_heads / tensor * min(work.keys, 2048) * (4 + width)
    block = work.kept * (width * (8 * stack.dim + 2 * stack.hidden_dim / tensor) + scores)
    if stack.remat == "none":
        return stack.num_layers * block
    return stack.num_layers * work.kept * stack.dim * width + 2 * block


def _sent(model: ModelConfig, stacks: list[_Work], mesh: Mapping[str, int], width: int) -> float:
    """Bytes that a device sends for one part of a batch."""

    def share(axis: str) -> float:
        return (mesh[axis] - 1) / mesh[axis]

    parameters = flops.num_parameters(model) / mesh["tensor"]
    # Gathered for the forward and the backward pass; gradients scattered; both summed over data.
    sent = 3 * width * parameters * share("fsdp")
    sent += 2 * 4 * parameters / mesh["fsdp"] * share("data")
    for work in stacks:  # two sums in a block forward, two backward, one computed again
        activations = work.stack.num_layers * work.positions * work.stack.dim * width
        sent += 5 * 2 * activations * share("tensor")
    # Keys and values of the whole sequence: forward, again, and their gradients.
    keys = stacks[0].stack.kv_heads * stacks[0].stack.head_width / mesh["tensor"]
    gathered = stacks[0].stack.num_layers * stacks[0].positions * mesh["sequence"] * keys * width
    return sent + 3 * 2 * gathered * share("sequence")
