"""Trains a model: train.py --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...].

Run again on the same directory it resumes, bit for bit, from the last checkpoint.
"""

import contextlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from megabyte_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all the run makes.", required=True)
flags.mark_flag_as_required("config")


def train(config: ConfigDict, workdir: str) -> None:
    """Trains a model from its last checkpoint, if there is one, to the end of its budget.

    Args:
        config: as `configs/base.py` declares it.
        workdir: the work directory, made if need be.

    Raises:
        UserError: the config or the directory cannot be used.
        DataError: the data cannot be read.
        NonFiniteError: the loss or the gradients are no longer finite.
        CheckpointError: there are checkpoints and none can be read.
    """
    # Here and not above, so that --help does not wait for JAX.
    import jax

    from megabyte_jax import checkpoint, evaluation, flops, generation, run_config
    from megabyte_jax.data import datasets, media, windows
    from megabyte_jax.metrics import Reporter
    from megabyte_jax.optimizer import make_optimizer, make_schedule, num_steps
    from megabyte_jax.sampling import Sampling
    from megabyte_jax.training import init_state, make_train_step

    model = run_config.validate(config)
    steps = num_steps(config.train, model.seq_len)
    schedule = make_schedule(config.optimizer, config.train, model.seq_len)
    documents, valid = datasets.open_splits(config.data, ("train", "valid"), model.patch_size)
    sampler = datasets.train_windows(config, documents, model.seq_len)
    directory = run_config.open_workdir(workdir, config, {"train": documents, "valid": valid})
    optimizer = make_optimizer(config.optimizer, schedule)
    print("compiling the initial state ...", file=sys.stderr)
    state = init_state(model, optimizer, config.seed)

    intervals = [part.interval for part in (config.eval, config.sample, config.checkpoint)]

    def due(interval: int) -> bool:
        return step == steps or (interval > 0 and step % interval == 0)

    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.open_manager(directory, config.checkpoint))
        state = checkpoint.restore_state(manager, state) or state
        start = int(state.step)
        reporter = stack.enter_context(
            Reporter(
                directory,
                start=start,
                num_steps=steps,
                bytes_per_step=config.train.batch_size * model.seq_len,
                log_interval=config.log_interval,
                peak=flops.matmul_rate(model.dtype) / flops.train_flops_per_byte(model),
            )
        )
        size = sum(x.size for x in jax.tree.leaves(state.params))
        reporter.say(
            f"{size:,} parameters; {documents.num_bytes:,} bytes of {documents.name} to train "
            f"on; updates {start} to {steps} on {jax.devices()[0].device_kind}"
        )
        if start >= steps:
            reporter.say("the budget is spent; a larger train.num_bytes or num_steps goes on")
            return
        update = make_train_step(
            model, optimizer, schedule, config.seed, config.train.grad_accumulation
        )
        with reporter.paused("compiling the update"):
            update = update.lower(state, sampler.batch(start)).compile()

        previous = None
        batches = windows.prefetch(sampler.batch, range(start, steps), config.data.workers)
        for step, batch in enumerate(batches, start + 1):
            state, metrics = update(state, batch)
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
                    prompt = config.sample.prompt.encode("utf-8", "surrogateescape")
                    sampling = Sampling(temperature=config.sample.temperature, seed=config.seed)
                    (sample,) = generation.generate(
                        model, state.params, [prompt], config.sample.num_bytes, sampling
                    )
                    contents = media.encode(prompt + sample.data, config.data, model.patch_size)
                    reporter.sample(step, contents, media.SUFFIXES[config.data.modality])
            if due(config.checkpoint.interval):
                with reporter.paused("saving"):
                    checkpoint.save(manager, state)


def main() -> None:
    """Trains as the flags say."""
    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
