"""Trains a model: train.py --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...].

Run again on the same directory it resumes, bit for bit, from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from megabyte_jax import cli

if TYPE_CHECKING:  # so that --help does not wait for JAX
    import jax

    from megabyte_jax.checkpoint import Checkpoints
    from megabyte_jax.guard import Guard
    from megabyte_jax.metrics import Reporter
    from megabyte_jax.models.config import ModelConfig
    from megabyte_jax.models.functional import Params
    from megabyte_jax.preemption import Preemption
    from megabyte_jax.run import Run
    from megabyte_jax.skips import Ranges
    from megabyte_jax.training import Metrics, TrainState
    from megabyte_jax.watchdog import Watchdog

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all the run makes.", required=True)
VALIDATE_ONLY = flags.DEFINE_boolean("validate_only", False, "Prints what the run would be.")
ACCEPT_CONFIG_CHANGE = flags.DEFINE_boolean(
    "accept_config_change", False, "Goes on although the numbers of the updates to come change."
)
PROCESSES = cli.define_processes()
flags.mark_flag_as_required("config")


class Life(NamedTuple):
    """What a run has at hand until it is done or goes back.

    Attributes:
        skip: the batches to be left out.
        checkpoints: the run's.
        reporter: of what happens.
        guard: which judges the updates.
        watchdog: which ends a run that no longer gets on.
    """

    skip: Ranges
    checkpoints: Checkpoints
    reporter: Reporter
    guard: Guard
    watchdog: Watchdog


def train(
    config: ConfigDict,
    workdir: str,
    devices: Sequence[Any] | None = None,
    preemption: Preemption | None = None,
    *,
    accept_config_change: bool = False,
) -> None:
    """Trains a model from its last checkpoint, if there is one, to the end of its budget.

    Args:
        config: as `configs/base.py` declares it.
        workdir: the work directory, made if need be.
        devices: of which the mesh is made; None for all that are attached, to all processes.
        preemption: which listens to signals; None if nothing does.
        accept_config_change: whether a run goes on with other settings than it began with.

    Raises:
        UserError: the config or the directory cannot be used.
        DataError: the data cannot be read.
        NonFiniteError: the state, or an update of it, is not to be trusted.
        CheckpointError: there are checkpoints and none can be used.
        StorageError: there is no room for checkpoints, or they cannot be written.
        LockedError: another run has the directory.
    """
    # Here and not above, so that --help does not wait for JAX.
    import jax

    from megabyte_jax import distributed, lock, run_config
    from megabyte_jax.preemption import Preemption
    from megabyte_jax.run import prepare

    with distributed.together():
        run_config.validate(config)  # before the others are told of it, as JSON
    told = {"--accept_config_change": accept_config_change}
    distributed.agree("config", run_config.flatten(config) | told)
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if distributed.is_primary():
                stack.enter_context(lock.hold(workdir))
        run = prepare(
            config,
            workdir,
            devices or jax.devices(),
            preemption or Preemption(),
            accept_config_change,
        )
        stack.enter_context(jax.set_mesh(run.mesh))
        while not go_on(run):  # a run that goes back, over bad batches, begins again there
            pass


def go_on(run: Run) -> bool:
    """Trains from the last checkpoint on, or from the initial state.

    Returns:
        Whether the budget is spent; if not, the run has gone back, to leave some batches out.
    """
    from megabyte_jax import checkpoint, distributed, environment, files, flops, skips
    from megabyte_jax.guard import Guard, RollBack
    from megabyte_jax.metrics import Reporter
    from megabyte_jax.training import init_state, judged
    from megabyte_jax.watchdog import Watchdog

    config, model, primary = run.config, run.model, distributed.is_primary()
    rolled_back = skips.read(run.directory)
    skip = skips.union([*config.train.skip, *rolled_back])
    now = environment.fingerprint(run.mesh)
    facts = {"skip": skip, "environment": now}
    rate = flops.matmul_rate(model.dtype) * run.mesh.size
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog())
        watchdog.begin("starting", config.watchdog.pause_seconds)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(run.directory, config.checkpoint, facts)
        )
        restored = checkpoints.restore(run.like)
        if restored:
            state, before = restored
            for changed in environment.differences(before["environment"], now):
                if primary:
                    files.say(f"not bit for bit as it would have been: {changed}")
        else:
            if primary:
                files.say("compiling the initial state ...")
            state = init_state(model, run.optimizer, config.seed, run.like)
        with distributed.together():
            reporter = stack.enter_context(
                Reporter(
                    run.directory,
                    start=int(state.step),
                    num_steps=run.steps,
                    bytes_per_step=config.train.batch_size * model.seq_len,
                    log_interval=config.log_interval,
                    peak=rate / flops.train_flops_per_byte(model),
                    primary=primary,
                )
            )
        guard = Guard(config.guard, judged(run.like), run.sampler, len(rolled_back))
        try:
            make_updates(run, Life(skip, checkpoints, reporter, guard, watchdog), state)
        except RollBack as back:
            checkpoints.forget(after=back.first)
            with distributed.together():
                if primary:
                    skips.add(run.directory, back.first, back.stop)
            reporter.say(f"{back}; going back, to leave out batches {back.first}-{back.stop - 1}")
            return False
    return True


def make_updates(run: Run, life: Life, state: TrainState) -> None:
    """Makes the updates that are left, and saves, evaluates and samples in between."""
    import jax

    from megabyte_jax import distributed, replicas, skips
    from megabyte_jax.guard import RollBack
    from megabyte_jax.training import make_pass_over

    config, steps, preemption, checkpoints = run.config, run.steps, run.preemption, life.checkpoints
    reporter, watchdog, pause_seconds = life.reporter, life.watchdog, config.watchdog.pause_seconds
    step_seconds, data_seconds = config.watchdog.step_seconds, config.watchdog.data_seconds
    step = start = int(state.step)
    previous: tuple[int, Metrics] | None = None

    def settle() -> None:
        """Waits for the last update and judges it."""
        nonlocal previous
        if previous:
            (number, metrics), previous = previous, None
            refused = life.guard.judge(number, metrics)
            if refused:
                reporter.say(refused)
            else:
                reporter.update(number, metrics)

    def save() -> str:
        """Saves the last update, as the run is told to stop."""
        with watchdog.during("saving", pause_seconds):
            try:
                settle()
            except RollBack as back:
                return f"{back}; run again it comes to that once more and goes back"
            done = int(state.step)
            if done == start:
                return f"there is nothing new since update {start}"
            checkpoints.save_now(state)
        return f"update {done} is saved, and run again it goes on from there"

    size, documents = sum(x.size for x in jax.tree.leaves(state.params)), run.splits["train"]
    reporter.say(
        f"{size:,} parameters; {documents.num_bytes:,} bytes of {documents.name} to train on; "
        f"updates {start} to {steps} on {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    )
    with preemption.holding(save):
        # A run that was stopped in an evaluation has saved the update that it was of.
        evaluates, samples = map(distributed.anywhere, reporter.lacks(start, run.suffix))
        look(run, life, step, state.params, evaluates=evaluates, samples=samples)
        if start >= steps:
            reporter.say("the budget is spent; a larger train.num_bytes or num_steps goes on")
            return
        update, pass_over = compile_update(run, life), make_pass_over(run.like)
        batches = prefetch(run, life, start)
        for step in range(start + 1, steps + 1):
            if distributed.preempted_together(preemption.requested):
                preemption.leave()
            if skips.contain(life.skip, step - 1):
                state = pass_over(state)
            else:
                with preemption.waiting():
                    with watchdog.during(f"waiting for batch {step - 1}", data_seconds):
                        x = next(batches)
                watchdog.begin(f"update {step}", step_seconds)
                state, metrics = update(state, x)
                settle()  # waits for the update before this one, which runs meanwhile
                previous = step, metrics
            checkpoints.require_storage()
            if run.due(step, config.guard.replica_interval):
                settle()
                replicas.require_equal(state, step)
            if run.due(step, config.eval.interval) or run.due(step, config.sample.interval):
                settle()
                look(run, life, step, state.params)
            if run.due(step, config.checkpoint.interval):
                settle()
                with reporter.paused("saving"), watchdog.during("saving", pause_seconds):
                    (checkpoints.save_now if step == steps else checkpoints.save)(state)


def compile_update(run: Run, life: Life) -> Any:
    """The compiled update, as `make_train_step` makes it."""
    import jax

    from megabyte_jax.training import make_train_step

    config = run.config
    update = make_train_step(
        run.model,
        run.optimizer,
        run.schedule,
        config.seed,
        config.train.grad_accumulation,
        run.like,
        config.guard,
    )
    with paused(run, life, "compiling the update"):
        example = jax.ShapeDtypeStruct(run.batch_shape, "uint8", sharding=run.batch_sharding)
        return update.lower(run.like, example).compile()


def prefetch(run: Run, life: Life, start: int) -> Iterator[jax.Array]:
    """The batches of the updates after `start`, uint8 [B, T], but for those to be left out."""
    from megabyte_jax import distributed, skips
    from megabyte_jax.data import windows

    def batch(step: int) -> jax.Array:
        rows = functools.partial(run.sampler.rows, step)
        return distributed.put_batch(rows, run.batch_shape, run.batch_sharding)

    wanted = (i for i in range(start, run.steps) if not skips.contain(life.skip, i))
    return windows.prefetch(batch, wanted, run.config.data.workers)


def look(
    run: Run,
    life: Life,
    step: int,
    params: Params,
    *,
    evaluates: bool = True,
    samples: bool = True,
) -> None:
    """Evaluates and samples, if it is time to."""
    from megabyte_jax import evaluation

    config, valid = run.config, run.splits["valid"]
    if evaluates and run.due(step, config.eval.interval):
        with paused(run, life, "evaluating", compiles=True):
            batch_size, num_bytes = config.eval.batch_size, config.eval.num_bytes
            result = evaluation.evaluate(run.model, params, valid, batch_size, num_bytes)
        life.reporter.evaluation(step, result.bits_per_byte, result.bytes)
    if samples and config.sample.num_bytes and run.due(step, config.sample.interval):
        with paused(run, life, "sampling", compiles=True):
            contents = sample(config, run.model, params)
        life.reporter.sample(step, contents, run.suffix)


@contextlib.contextmanager
def paused(run: Run, life: Life, what: str, *, compiles: bool = False) -> Iterator[None]:
    """Inside, the state does not change and may be saved by who preempts the run."""
    with life.reporter.paused(what, compiles=compiles), run.preemption.waiting():
        with life.watchdog.during(what, run.config.watchdog.pause_seconds):
            yield


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
    if VALIDATE_ONLY.value:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
        from megabyte_jax import run_summary

        print(run_summary.text(CONFIG.value, WORKDIR.value, ACCEPT_CONFIG_CHANGE.value))
        return

    from megabyte_jax.preemption import Preemption

    preemption = Preemption()
    with preemption.listening():  # before the imports that take seconds
        from megabyte_jax import distributed

        coordinator, num_processes, process_id = (flag.value for flag in PROCESSES)
        distributed.start(
            coordinator,
            num_processes,
            process_id,
            peer_seconds=CONFIG.value.watchdog.peer_seconds,
        )
        preemption.alone = distributed.is_alone()
        train(
            CONFIG.value,
            WORKDIR.value,
            preemption=preemption,
            accept_config_change=ACCEPT_CONFIG_CHANGE.value,
        )


if __name__ == "__main__":
    cli.run(main)
