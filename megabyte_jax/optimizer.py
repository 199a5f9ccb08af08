"""Schedules and the optimizer, from `config.optimizer` and the budget in `config.train`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from megabyte_jax.errors import UserError

# The customary five train a fifth slower in the quickstart and learn no more per byte: 2.09 bits
# after 0.8 MB, against 2.10 with three.
_NEWTON_SCHULZ_STEPS = 3
_NOT_DECAYED = ("bias", "scale", "pad")


def num_steps(train: Any, seq_len: int) -> int:
    """Updates in the budget of `config.train`, given in updates or in bytes.

    Args:
        train: `config.train`.
        seq_len: T in bytes.

    Returns:
        Number of updates, rounded up.

    Raises:
        UserError: both or none of num_steps and num_bytes are set, or they are too many.
    """
    steps = _steps("train.num", train.num_steps, train.num_bytes, train.batch_size * seq_len)
    if not 0 < steps < 2**31:
        raise UserError(
            f"train.num_steps={train.num_steps}: accepted is a budget in num_steps or in "
            f"num_bytes (now {train.num_bytes}) of at least one update and below 2**31"
        )
    return steps


def _steps(name: str, steps: int, byte_count: int, bytes_per_step: int) -> int:
    if steps and byte_count:
        raise UserError(
            f"{name}_bytes={byte_count}: accepted is 0 when {name}_steps={steps} is set"
        )
    return steps or -(-byte_count // bytes_per_step)


def make_schedule(optimizer: Any, train: Any, seq_len: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then linear, cosine or no decay.

    Linear to zero after 500 updates is the paper's (section A.1).

    Args:
        optimizer: `config.optimizer`.
        train: `config.train`.
        seq_len: T in bytes.

    Returns:
        Function of the number of updates made so far.

    Raises:
        UserError: the warm-up is given both in updates and in bytes, or outlasts the budget.
    """
    steps, peak = num_steps(train, seq_len), optimizer.learning_rate
    warmup = _steps(
        "optimizer.warmup",
        optimizer.warmup_steps,
        optimizer.warmup_bytes,
        train.batch_size * seq_len,
    )
    if warmup >= steps:
        name = "steps" if optimizer.warmup_steps else "bytes"
        raise UserError(
            f"optimizer.warmup_{name}={optimizer[f'warmup_{name}']}: accepted is less than the "
            f"budget of {steps} updates of {train.batch_size * seq_len} bytes"
        )
    end = peak * optimizer.end_fraction
    decay = {
        "linear": optax.linear_schedule(peak, end, steps - warmup),
        "cosine": optax.cosine_decay_schedule(peak, steps - warmup, optimizer.end_fraction),
        "constant": optax.constant_schedule(peak),
    }[optimizer.schedule]
    # From peak / (warmup + 1), so that the first update is not lost to a rate of zero.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(optimizer: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, the paper's, or Muon (Jordan, 2024), behind a clip of the gradients' global norm.

    With AdamW weights and embeddings decay; biases, normalisation scales and pads do not. Muon
    moves the matrices of the blocks, which alone decay, by orthogonalised updates of the size of
    Adam's (Liu et al., 2025), so that one learning rate serves both; Adam with Nesterov momentum
    moves the rest.

    Args:
        optimizer: `config.optimizer`; its state_dtype is that of the moments between updates.
        schedule: learning rate by update.
    """
    clip = optax.clip_by_global_norm(optimizer.clip_norm)
    if optimizer.name == "muon":
        muon = optax.contrib.muon(
            schedule,
            ns_steps=_NEWTON_SCHULZ_STEPS,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            adam_b1=optimizer.b1,
            adam_b2=optimizer.b2,
            muon_weight_dimension_numbers=_block_matrices,
            consistent_rms=0.2,
        )
        return optax.chain(clip, _kept_in(optimizer.state_dtype, muon))
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=_decays,
    )
    return optax.chain(clip, _kept_in(optimizer.state_dtype, adamw))


def _kept_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes in float32 and keeps the moments, which are shaped as parameters, in `dtype`."""

    def cast(state: Any, dtype: str) -> Any:
        def one(x: jax.Array) -> jax.Array:
            return x.astype(dtype) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(one, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(grads, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )


def _block_matrices(params: Any) -> Any:
    """Where Muon finds the matrices [L, in, out] of stacked blocks; None for all else."""

    def axes(path: tuple[Any, ...], _: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        stacked = "blocks" in names and names[-1] == "kernel"
        return optax.contrib.MuonDimensionNumbers(1, 2) if stacked else None

    return jax.tree_util.tree_map_with_path(axes, params)
