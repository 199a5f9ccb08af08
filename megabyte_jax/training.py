"""The train state and one update of it, as pure functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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


def init_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first update.

    Args:
        model: the model.
        optimizer: the optax chain.
        seed: of the initial weights.
    """
    params = functional.init_params(model, jax.random.key(seed))
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    grad_accumulation: int = 1,
) -> Any:
    """Makes the jitted update; it takes over (donates) the state it is given.

    Args:
        model: the model.
        optimizer: the optax chain.
        schedule: learning rate by update, which the metrics report.
        seed: of the dropout, whose key is a function of seed and step.
        grad_accumulation: equal parts the batch is computed in, one after another.

    Returns:
        Jitted function of the state and uint8 [B, T] bytes to the next state and the metrics of
        the update, float32 []: loss in nats per byte and grad_norm, before clipping, of the
        parameters it began with; learning_rate; param_norm of the parameters it made.
    """

    def loss_fn(params: functional.Params, x: jax.Array, key: jax.Array) -> jax.Array:
        return functional.nll(model, params, x, key).mean()

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        parts = batch.reshape(grad_accumulation, -1, batch.shape[-1])

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            loss_and_grads = jax.value_and_grad(loss_fn)(state.params, *part)
            return jax.tree.map(jnp.add, total, loss_and_grads), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
        keys = jax.random.split(key, grad_accumulation)
        total, _ = jax.lax.scan(add, zero, (parts, keys))
        loss, grads = jax.tree.map(lambda x: x / grad_accumulation, total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.float32(schedule(state.step)),
            "param_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
