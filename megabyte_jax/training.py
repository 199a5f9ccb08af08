"""The train state and one update of it, as pure functions."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from megabyte_jax import sharding
from megabyte_jax.models import functional
from megabyte_jax.models.config import ModelConfig

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything an update changes; the rest of a run follows from its config and the step.

    Attributes:
        step: int32 [], updates made.
        params: the model's parameters.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    params: functional.Params
    opt_state: Any


def abstract_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    offload: bool = False,
) -> TrainState:
    """Shapes, types and places of a state, without the state.

    Args:
        model: the model.
        optimizer: the optax chain.
        mesh: over which `sharding.shardings` spreads it.
        offload: whether the optimizer's state lies in the memory of the hosts.

    Returns:
        State of jax.ShapeDtypeStruct.

    Raises:
        UserError: the devices cannot use the memory of their host.
    """
    shapes = jax.eval_shape(lambda: _make_state(model, optimizer, jax.random.key(0)))
    places = sharding.shardings(mesh, shapes)
    if offload:
        places = places._replace(opt_state=sharding.on_host(mesh, places.opt_state))
    return sharding.placed(shapes, places)


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    like: TrainState | None = None,
) -> TrainState:
    """The state before the first update, each part made where it lies.

    Args:
        model: the model.
        optimizer: the optax chain.
        seed: of the initial weights, which do not depend on the mesh.
        like: where it lies, as `abstract_state` says; None for the default device.
    """
    init = jax.jit(functools.partial(_make_state, model, optimizer), out_shardings=_places(like))
    return init(jax.random.key(seed))


def _make_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    params = functional.init_params(model, key)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def _places(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    grad_accumulation: int = 1,
    like: TrainState | None = None,
    guard: Any = None,
) -> Any:
    """Makes the jitted update; it takes over (donates) the state it is given.

    An update is applied only if all that it comes from is finite and it is no spike. Else the
    arrays of the state stay as they are, and only its counts of updates go on, as in `pass_over`.

    Args:
        model: the model.
        optimizer: the optax chain.
        schedule: learning rate by update, which the metrics report.
        seed: of the dropout, whose key is a function of seed and step.
        grad_accumulation: equal parts the batch is computed in, one after another: part i has the
            rows i, i + grad_accumulation, ..., so that each device has its share of every part.
        like: where the state lies, as `abstract_state` says; None for the default device.
        guard: `config.guard`, which says what is a spike; None if nothing is.

    Returns:
        Jitted function of the state and uint8 [B, T] bytes to the next state and the metrics of
        the update, float32 []: loss in nats per byte and grad_norm, before clipping, of the
        parameters it began with; learning_rate; param_norm of the parameters it made. Beside them
        `finite`, bool [N], for each of `judged`; and `applied`, bool [].
    """
    places = _places(like)
    max_loss = (guard and guard.max_loss * math.log(2)) or math.inf
    max_grad_norm = (guard and guard.max_grad_norm) or math.inf

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = _accumulated(model, state.params, batch, key, grad_accumulation, places)
        opt_state = state.opt_state
        if places:
            opt_state = jax.device_put(opt_state, sharding.on_device(places.opt_state))
        # Each process judges by it, so each is to have all of it.
        finite = sharding.constrain(_finite((state.params, opt_state, loss, grads)), None)
        grad_norm = optax.tree.norm(grads)
        applied = finite.all() & (loss <= max_loss) & (grad_norm <= max_grad_norm)
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        params = _where(applied, optax.apply_updates(state.params, updates), state.params)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.float32(schedule(state.step)),
            "param_norm": optax.tree.norm(params),
            "finite": finite,
            "applied": applied,
        }
        opt_state = _where(applied, new_opt_state, opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=places and (places, None))


def _accumulated(
    model: ModelConfig,
    params: functional.Params,
    batch: jax.Array,
    key: jax.Array,
    grad_accumulation: int,
    places: TrainState | None,
) -> tuple[jax.Array, functional.Params]:
    """The mean loss of a batch and its gradient, of one part after another."""
    parts = batch.reshape(-1, grad_accumulation, batch.shape[-1]).swapaxes(0, 1)
    parts = sharding.constrain(parts, None, "batch", "patch")

    def loss_fn(params: functional.Params, x: jax.Array, key: jax.Array) -> jax.Array:
        return functional.nll(model, params, x, key).mean()

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        loss, grads = jax.value_and_grad(loss_fn)(params, *part)
        loss, grads = jax.tree.map(jnp.add, total, (loss, grads))
        if places:
            grads = jax.lax.with_sharding_constraint(grads, places.params)
        return (loss, grads), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape), (jnp.float32(0), params))
    total, _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, grad_accumulation)))
    return jax.tree.map(lambda x: x / grad_accumulation, total)


def judged(state: TrainState) -> list[str]:
    """Names of what an update comes from, in the order of its metric `finite`.

    Args:
        state: or its shapes and types.
    """
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    parts = ("params", state.params), ("opt_state", state.opt_state), ("loss", loss)
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for name, part in (*parts, ("grads", state.params))
        for path, x in jax.tree.leaves_with_path({name: part})
        if _may_be_infinite(x)
    ]


def make_pass_over(like: TrainState | None = None) -> Any:
    """Makes the jitted update that leaves a batch out; it donates the state it is given.

    Args:
        like: where the state lies, as `abstract_state` says; None for the default device.

    Returns:
        Jitted function of the state to the next, which differs in its counts of updates alone, so
        that the schedule goes on.
    """

    def one(x: jax.Array) -> jax.Array:
        return x if _may_be_infinite(x) else x + 1

    return jax.jit(
        lambda state: jax.tree.map(one, state), donate_argnums=0, out_shardings=_places(like)
    )


def _may_be_infinite(x: Any) -> bool:
    """Whether it is an array of numbers rather than a count of updates, the only integers."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def _finite(tree: Any) -> jax.Array:
    """Bool [N], for each array of numbers; by its sum of squares, which is cheapest."""
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree) if _may_be_infinite(x)]
    return jnp.isfinite(jnp.stack([jnp.sum(jnp.square(x)) for x in leaves]))


def _where(applied: jax.Array, new: Any, old: Any) -> Any:
    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(applied, new, old) if _may_be_infinite(new) else new

    return jax.tree.map(one, new, old)
