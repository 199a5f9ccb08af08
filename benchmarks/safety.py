"""What the safety of a run costs, at the size of the quickstart.

    python -m benchmarks.safety --output=safety.json

Prints a line per figure: the median of its repeats and their range, in percent of what it is
compared with. What is a call of ours is timed where it is called, within what it adds to: a machine
that is busy slows both. What is no call of ours is done with and without it in turns.

save: digests, manifest and reading back, within a save from its start until it is announced.
finite: the look whether all that is saved is finite, within the same.
wait: digests and manifest, within the part of a save for which updates wait.
item: the manifest as an item that Orbax writes; saves with and without it.
restore: verifying a checkpoint, within reading it.
step: the watchdog, the turns with the preemption and the judgement, within an update.
check: looking inside an update whether it is finite before it is applied; updates with and without.
"""

import argparse
import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from benchmarks import machine
from benchmarks.generation import Figure
from configs import quickstart
from megabyte_jax import checkpoint, distributed, lock, manifest, run_config, sharding, training
from megabyte_jax.data import datasets
from megabyte_jax.guard import Guard
from megabyte_jax.models.config import ModelConfig
from megabyte_jax.optimizer import make_optimizer, make_schedule
from megabyte_jax.preemption import Preemption
from megabyte_jax.training import TrainState
from megabyte_jax.watchdog import Watchdog

COMPOSITE = ocp.args.Composite


class Stopwatch:
    """Adds up the seconds spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                result = function(*args, **kwargs)
                return result.block_until_ready() if isinstance(result, jax.Array) else result
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    @contextlib.contextmanager
    def on(self, *places: tuple[Any, str]) -> Iterator[None]:
        """Inside, the functions at some places are timed."""
        with contextlib.ExitStack() as stack:
            for owner, name in places:
                timed = self.within(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


def share(watch: Stopwatch, what: Callable[[], Any], repeats: int) -> list[float]:
    """Percent that what is timed adds to the rest of something, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        watch.seconds, start = 0.0, time.perf_counter()
        what()
        rest = time.perf_counter() - start - watch.seconds
        found.append(100 * watch.seconds / rest)
    return found[1:]


def percent(with_it: Callable[[], Any], without: Callable[[], Any], repeats: int) -> list[float]:
    """How much longer one thing takes than the other, in pairs, after one that warms up."""
    found = []
    for i in range(repeats + 1):
        took = {}
        for what in (with_it, without) if i % 2 else (without, with_it):
            start = time.perf_counter()
            what()
            took[what] = time.perf_counter() - start
        found.append(100 * (took[with_it] / took[without] - 1))
    return found[1:]


def saves(state: TrainState, repeats: int) -> Iterator[Figure]:
    """Saving and restoring a state."""
    config = quickstart.get_config().checkpoint
    facts: dict[str, object] = {"skip": (), "environment": {}}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(checkpoint.files, "say"))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(Path(folder), config, facts))
        step = 0

        def numbered() -> TrainState:
            nonlocal step
            step += 1
            return state._replace(step=jax.numpy.int32(step))

        def save() -> None:
            checkpoints.save(numbered())
            checkpoints.finish()

        def bare() -> None:
            with mock.patch.object(ocp.args, "Composite", without_manifest):
                with mock.patch.object(manifest, "verify"):
                    save()

        watch = Stopwatch()
        before = (manifest, "chunks"), (manifest, "make")
        with watch.on(*before, (manifest, "verify")):
            yield Figure("save", share(watch, save, repeats), "%", 5, at_most=True)
        with watch.on((checkpoint, "_all_finite")):
            yield Figure("finite", share(watch, save, repeats), "%")
        with watch.on(*before):
            yield Figure("wait", share(watch, lambda: checkpoints.save(numbered()), repeats), "%")
        with mock.patch.object(manifest, "verify"):
            yield Figure("item", percent(save, bare, repeats), "%")
        save()
        with watch.on((manifest, "read"), (manifest, "verify")):
            restore = functools.partial(checkpoints.restore, state)
            yield Figure("restore", share(watch, restore, repeats), "%")


def without_manifest(manifest: Any, **items: Any) -> Any:
    """The items of a save but for the manifest."""
    return COMPOSITE(**items)


def updates(config: ConfigDict, model: ModelConfig, repeats: int) -> Iterator[Figure]:
    """Making updates."""
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    schedule = make_schedule(config.optimizer, config.train, model.seq_len)
    optimizer = make_optimizer(config.optimizer, schedule)
    like = training.abstract_state(model, optimizer, mesh)
    (documents,) = datasets.open_splits(config.data, ("train",), model.patch_size)
    sampler = datasets.train_windows(config, documents, model.seq_len)
    guard = Guard(config.guard, training.judged(like), sampler, 0)
    preemption, watch = Preemption(), Stopwatch()
    batch = jax.device_put(sampler.rows(0, 0, config.train.batch_size))

    def compiled() -> Callable[..., tuple[TrainState, training.Metrics]]:
        return training.make_train_step(model, optimizer, schedule, config.seed, 1, like)

    update = compiled()
    with mock.patch.object(training, "_finite", lambda tree: jax.numpy.ones(1, bool)):
        with mock.patch.object(training, "_where", lambda applied, new, old: new):
            unchecked = compiled()
            state = training.init_state(model, optimizer, config.seed, like)
            state, _ = unchecked(state, batch)  # compiled while the patches hold

    def run(update: Callable[..., tuple[TrainState, training.Metrics]]) -> training.Metrics:
        nonlocal state
        state, metrics = update(state, batch)
        return jax.block_until_ready(metrics)

    @watch.within
    def before() -> None:
        distributed.preempted_together(preemption.requested)
        with preemption.waiting(), watchdog.during("waiting for batch 1", 300):
            pass
        watchdog.begin("update 1", 600)

    judge = watch.within(guard.judge)

    def watched() -> None:
        before()
        judge(1, run(update))

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(lock.hold(folder))
        watchdog = stack.enter_context(Watchdog())
        stack.enter_context(preemption.holding(lambda: ""))
        yield Figure("step", share(watch, watched, repeats), "%", 1, at_most=True)
        yield Figure("check", percent(lambda: run(update), lambda: run(unchecked), repeats), "%")
    yield from saves(state, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", default="", help="JSON with all repeats")
    flags = parser.parse_args(arguments)
    config = quickstart.get_config()
    figures = []
    for figure in updates(config, run_config.validate(config), flags.repeats):
        print(figure, flush=True)
        figures.append(figure)
    if flags.output:
        found = {figure.name: list(np.round(figure.values, 3)) for figure in figures}
        command = f"python -m benchmarks.safety --repeats={flags.repeats}"
        contents = {**machine.description(command), "percent": found}
        Path(flags.output).write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
