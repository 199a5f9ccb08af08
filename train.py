"""Trains a model: train.py --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...].

Run again on the same directory it resumes, bit for bit, from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from megabyte_jax import cli

if TYPE_CHECKING:  # so that --help does not wait for JAX
    from megabyte_jax.models.config import ModelConfig
    from megabyte_jax.models.functional import Params

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all the run makes.", required=True)
PROCESSES = cli.define_processes()
flags.mark_flag_as_required("config")


def train(config: ConfigDict, workdir: str, devices: Sequence[Any] | None = None) -> None:
    """Trains a model from its last checkpoint, if there is one, to the end of its budget.

    Args:
        config: as `configs/base.py` declares it.
        workdir: the work directory, made if need be.
        devices: of which the mesh is made; None for all that are attached, to all processes.

    Raises:
        UserError: the config or the directory cannot be used.
        DataError: the data cannot be read.
        NonFiniteError: the loss or the gradients are no longer finite.
        CheckpointError: there are checkpoints and none can be read.
    """
    # Here and not above, so that --help does not wait for JAX.
    import jax

    from megabyte_jax import checkpoint, distributed, evaluation, flops, run_config, sharding
    from megabyte_jax.data import datasets, media, windows
    from megabyte_jax.metrics import Reporter
    from megabyte_jax.optimizer import make_optimizer, make_schedule, num_steps
    from megabyte_jax.training import abstract_state, init_state, make_train_step

    distributed.agree("config", run_config.flatten(config))
    with distributed.together():
        model = run_config.validate(config)
        mesh = sharding.make_mesh(config.mesh, devices or jax.devices())
        sharding.check(mesh.shape, model, config.train.batch_size, config.train.grad_accumulation)
        steps = num_steps(config.train, model.seq_len)
        schedule = make_schedule(config.optimizer, config.train, model.seq_len)
        optimizer = make_optimizer(config.optimizer, schedule)
        like = abstract_state(model, optimizer, mesh, offload=config.optimizer.offload)
        documents, valid = datasets.open_splits(config.data, ("train", "valid"), model.patch_size)
        sampler = datasets.train_windows(config, documents, model.seq_len)
    splits = {"train": documents, "valid": valid}
    distributed.agree("data", {name: split.fingerprint for name, split in splits.items()})
    with distributed.together():
        directory = run_config.open_workdir(workdir, config, splits)
    distributed.require_shared(directory)
    rate = flops.matmul_rate(model.dtype) * mesh.size

    intervals = [part.interval for part in (config.eval, config.sample, config.checkpoint)]

    def due(interval: int) -> bool:
        return step == steps or (interval > 0 and step % interval == 0)

    def batch(step: int) -> jax.Array:
        shape = config.train.batch_size, model.seq_len
        rows = functools.partial(sampler.rows, step)
        return distributed.put_batch(rows, shape, sharding.batch_sharding(mesh))

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        manager = stack.enter_context(checkpoint.open_manager(directory, config.checkpoint))
        state = checkpoint.restore_state(manager, like)
        if state is None:
            if distributed.is_primary():
                print("compiling the initial state ...", file=sys.stderr)
            state = init_state(model, optimizer, config.seed, like)
        start = int(state.step)
        reporter = stack.enter_context(
            Reporter(
                directory,
                start=start,
                num_steps=steps,
                bytes_per_step=config.train.batch_size * model.seq_len,
                log_interval=config.log_interval,
                peak=rate / flops.train_flops_per_byte(model),
                primary=distributed.is_primary(),
            )
        )
        size = sum(x.size for x in jax.tree.leaves(state.params))
        reporter.say(
            f"{size:,} parameters; {documents.num_bytes:,} bytes of {documents.name} to train "
            f"on; updates {start} to {steps} on {mesh.size} x {mesh.devices.flat[0].device_kind}"
        )
        if start >= steps:
            reporter.say("the budget is spent; a larger train.num_bytes or num_steps goes on")
            return
        update = make_train_step(
            model, optimizer, schedule, config.seed, config.train.grad_accumulation, like
        )
        with reporter.paused("compiling the update"):
            update = update.lower(state, batch(start)).compile()

        previous = None
        batches = windows.prefetch(batch, range(start, steps), config.data.workers)
        for step, x in enumerate(batches, start + 1):
            state, metrics = update(state, x)
            if previous:  # waits for the update before this one, which runs meanwhile
                reporter.update(*previous)
            previous = step, metrics
            if not any(map(due, intervals)):
                continue
            reporter.update(*previous)  # before a save, which must not hold a non-finite state
            previous = None
            if due(config.eval.interval):
                with reporter.paused("evaluating", compiles=True):
                    result = evaluation.evaluate(
                        model, state.params, valid, config.eval.batch_size, config.eval.num_bytes
                    )
                reporter.evaluation(step, result.bits_per_byte, result.bytes)
            if due(config.sample.interval):
                with reporter.paused("sampling", compiles=True):
                    contents = sample(config, model, state.params)
                reporter.sample(step, contents, media.SUFFIXES[config.data.modality])
            if due(config.checkpoint.interval):
                with reporter.paused("saving"):
                    checkpoint.save(manager, state)


def sample(config: ConfigDict, model: ModelConfig, params: Params) -> bytes:
    """The contents of a file in which a model goes on from `config.sample.prompt`."""
    from megabyte_jax import generation
    from megabyte_jax.data import media
    from megabyte_jax.sampling import Sampling

    prompt = config.sample.prompt.encode("utf-8", "surrogateescape")
    sampling = Sampling(temperature=config.sample.temperature, seed=config.seed)
    (made,) = generation.generate(model, params, [prompt], config.sample.num_bytes, sampling)
    return media.encode(prompt + made.data, config.data, model.patch_size)


def main() -> None:
    """Trains as the flags say."""
    from megabyte_jax import distributed

    distributed.start(*(flag.value for flag in PROCESSES))
    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
