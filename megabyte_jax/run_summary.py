"""What a run would be, from its config alone: no data, no device, nothing compiled or written."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from megabyte_jax import flops, run_changes, run_config, sharding
from megabyte_jax.models import functional
from megabyte_jax.models.config import ModelConfig
from megabyte_jax.optimizer import make_optimizer, make_schedule, num_steps


def text(config: ConfigDict, workdir: str, accept_config_change: bool = False) -> str:
    """Checks a config as a run does before it reads its data, and says what the run would be.

    How it differs from the run that is in the work directory goes to stderr.

    Args:
        config: as `configs/base.py` declares it.
        workdir: the work directory, which may not be there.
        accept_config_change: as `train` takes it.

    Returns:
        Lines for people.

    Raises:
        UserError: the config or the directory cannot be used.
    """
    model = run_config.validate(config)
    _check_mesh(config, model)
    steps = num_steps(config.train, model.seq_len)
    optimizer = make_optimizer(
        config.optimizer, make_schedule(config.optimizer, config.train, model.seq_len)
    )
    params = parameters(model)
    opt_state = jax.eval_shape(optimizer.init, params)
    run_changes.check(workdir, run_config.changes(workdir, config), accept_config_change)
    update_bytes = config.train.batch_size * model.seq_len
    weights, moments = _size(params), _size(opt_state)
    lines = (
        f"parameters        {sum(math.prod(x.shape) for x in jax.tree.leaves(params)):,}",
        f"state             {weights + moments:,} bytes: {weights:,} of parameters, {moments:,} of "
        f"{config.optimizer.name}",
        f"checkpoint        {weights + moments:,} bytes, {config.checkpoint.keep} kept",
        f"update            {update_bytes:,} bytes: {config.train.batch_size:,} sequences of "
        f"{model.seq_len:,}",
        f"updates           {steps:,}, {steps * update_bytes:,} bytes in all",
        f"FLOPs per byte    {flops.train_flops_per_byte(model):.4g}, "
        f"{flops.train_flops_per_byte(model) * steps * update_bytes:.4g} in all",
    )
    return "\n".join(lines)


@functools.cache
def parameters(model: ModelConfig) -> functional.Params:
    """Shapes and types of the parameters of a model, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda: functional.init_params(model, jax.random.key(0)))


def _check_mesh(config: ConfigDict, model: ModelConfig) -> None:
    """Checks what can be known without the devices, by the smallest mesh that the sizes allow."""
    sizes = config.mesh.to_dict()
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = sharding.mesh_shape(sizes, known)
    sharding.check(shape, model, config.train.batch_size, config.train.grad_accumulation)


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
