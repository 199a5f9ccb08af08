"""What the safety of a run costs, at the size of the quickstart.

    python -m benchmarks.safety --output=safety.json

Prints a line per figure: the median of its repeats and their range, in percent of what it is
compared with. The two take turns in one process, so that a machine that is busy is so for both.

save: from the start of a save until it is announced, for digests, manifest and reading back.
wait: the part of that for which updates wait.
step: an update, for the watchdog, the turns with the preemption, the lock and the judgement.
check: an update, for looking whether it is finite before it is applied.
restore: reading a checkpoint, for verifying it first.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import machine
from benchmarks.generation import Figure
from configs import quickstart
from megabyte_jax import checkpoint, lock, manifest, run_config, sharding, training
from megabyte_jax.data import datasets
from megabyte_jax.guard import Guard
from megabyte_jax.models.config import ModelConfig
from megabyte_jax.optimizer import make_optimizer, make_schedule
from megabyte_jax.preemption import Preemption
from megabyte_jax.training import TrainState
from megabyte_jax.watchdog import Watchdog

UPDATES = 8  # of a repeat


def percent(
    with_it: Callable[[], float], without: Callable[[], float], repeats: int
) -> list[float]:
    """How much longer one thing takes than the other, in pairs, after one that warms up."""
    found = []
    for i in range(repeats + 1):
        first, second = (with_it, without) if i % 2 else (without, with_it)
        took = {first: first()}
        took[second] = second()
        found.append(100 * (took[with_it] / took[without] - 1))
    return found[1:]


@contextlib.contextmanager
def nothing_verified() -> Iterator[None]:
    """Checkpoints without digests, as Orbax alone writes them."""
    with contextlib.ExitStack() as stack:
        for name, value in (("chunks", {}), ("verify", None)):
            replacement = mock.Mock(return_value=value)
            stack.enter_context(mock.patch.object(manifest, name, replacement))
        yield


def saves(state: TrainState, repeats: int) -> Iterator[Figure]:
    """Saving and restoring a state."""
    config = quickstart.get_config().checkpoint
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(checkpoint.files, "say"))
        facts: dict[str, object] = {"skip": (), "environment": {}}
        checkpoints = stack.enter_context(checkpoint.Checkpoints(Path(folder), config, facts))
        step = 0

        def save() -> float:
            nonlocal step
            step += 1
            numbered = state._replace(step=jax.numpy.int32(step))
            jax.block_until_ready(numbered)
            start = time.perf_counter()
            checkpoints.save(numbered)
            wait = time.perf_counter()
            checkpoints.finish()
            times.setdefault("wait", []).append(wait - start)
            return time.perf_counter() - start

        def bare() -> float:
            with nothing_verified():
                return save()

        def restore() -> float:
            start = time.perf_counter()
            checkpoints.restore(state)
            return time.perf_counter() - start

        def trust() -> float:
            with mock.patch.object(manifest, "verify"):
                return restore()

        total = percent(save, bare, repeats)
        waits = times["wait"][2:]
        pairs = [waits[i : i + 2] for i in range(0, len(waits), 2)]
        # The order of a pair alternates, as in `percent`.
        ordered = [(a, b) if i % 2 == 0 else (b, a) for i, (a, b) in enumerate(pairs)]
        yield Figure("save", total, "%", 5, at_most=True)
        yield Figure("wait", [100 * (a / b - 1) for a, b in ordered], "%")
        save()
        yield Figure("restore", percent(restore, trust, repeats), "%")


def updates(config: ConfigDict, model: ModelConfig, repeats: int) -> Iterator[Figure]:
    """Making updates."""
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    schedule = make_schedule(config.optimizer, config.train, model.seq_len)
    optimizer = make_optimizer(config.optimizer, schedule)
    like = training.abstract_state(model, optimizer, mesh)
    (documents,) = datasets.open_splits(config.data, ("train",), model.patch_size)
    sampler = datasets.train_windows(config, documents, model.seq_len)
    guard = Guard(config.guard, training.judged(like), sampler, 0)
    preemption = Preemption()
    batches = [jax.device_put(sampler.rows(i, 0, config.train.batch_size)) for i in range(UPDATES)]

    def compiled() -> Callable[..., tuple[TrainState, training.Metrics]]:
        return training.make_train_step(model, optimizer, schedule, config.seed, 1, like)

    update = compiled()
    with mock.patch.object(training, "_finite", lambda tree: jax.numpy.ones(1, bool)):
        with mock.patch.object(training, "_where", lambda applied, new, old: new):
            unchecked = compiled()
            state = training.init_state(model, optimizer, config.seed, like)
            state, _ = unchecked(state, batches[0])  # compiled while the patches hold

    def run(update: Callable[..., tuple[TrainState, training.Metrics]]) -> float:
        nonlocal state
        start = time.perf_counter()
        for x in batches:
            state, metrics = update(state, x)
            float(metrics["loss"])
        return time.perf_counter() - start

    def watched() -> float:
        nonlocal state
        start = time.perf_counter()
        for step, x in enumerate(batches, 1):
            with preemption.waiting(), watchdog.during(f"waiting for batch {step}", 300):
                pass
            watchdog.begin(f"update {step}", 600)
            state, metrics = update(state, x)
            guard.judge(step, metrics)
            float(metrics["loss"])
        return time.perf_counter() - start

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(lock.hold(folder))
        watchdog = stack.enter_context(Watchdog())
        stack.enter_context(preemption.holding(lambda: ""))
        yield Figure("step", percent(watched, lambda: run(update), repeats), "%", 1, at_most=True)
        yield Figure("check", percent(lambda: run(update), lambda: run(unchecked), repeats), "%")
    yield from saves(state, 5 * repeats)  # what the disk takes varies more


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
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
