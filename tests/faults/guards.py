"""What is wrong inside a run: values that are not finite, copies that differ."""

import random
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from megabyte_jax import replicas, run_config, sharding, training
from megabyte_jax.errors import NonFiniteError
from megabyte_jax.optimizer import make_optimizer
from tests import runs
from tests.faults import driver, values
from tests.faults.driver import Outcome, Trainer
from tests.faults.kills import chain

# Where NaN is put, and what the message has to name.
NAMED = {
    "gradient": "grads.",
    "optimizer": "opt_state.",
    "embedding": "grads.",
    "activations": "grads.",
    "loss": "loss is not finite",
    "params": "params.",
}


def not_finite(scratch: Path, tries: int, seed: int) -> Outcome:
    """NaN at one site after another: told of the very update it is in, and never saved."""
    moments = random.Random(seed)

    def at(site: str, batch: int) -> tuple[str, Callable[[Trainer], bool]]:
        def strike(life: Trainer) -> bool:
            assert life.end() == 6, life.said[-1000:]
            assert f"error: update {batch + 1}: " in life.said, life.said[-1000:]
            assert NAMED[site] in life.said and f"batch {batch} " in life.said, life.said[-1000:]
            newest = max(driver.checkpoints(life.workdir), default=0)
            assert newest <= batch, f"update {newest} was saved"
            state = runs.saved_state(life.workdir, newest) if newest else {}
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
            return True

        return f"{site}:{batch}:{moments.randrange(100)}", strike

    strikes = [at(list(NAMED)[i % 6], 6 * i + moments.randrange(6)) for i in range(tries)]
    return chain(scratch, driver.tiny(**{"train.num_steps": max(60, 6 * tries + 6)}), strikes[::-1])


def policies(scratch: Path, tries: int, seed: int) -> Outcome:
    """skip_update and rollback_skip: the run is one that was told to leave the batches out."""
    lost, moments = [], random.Random(seed)
    for i in range(tries):
        batch = moments.randrange(10, 30)
        policy, first, stop = [
            ("rollback_skip", batch - 3, batch + 4),
            ("skip_update", batch, batch + 1),
        ][i % 2]
        kept = {"checkpoint.keep": 9}
        config = driver.tiny(**kept, **{"guard.policy": policy, "guard.rollback_window": 3})
        with Trainer(config, scratch / f"{i}", f"loss:{batch}:0") as life:
            status = life.end()
        skips = driver.tiny(**kept, **{"train.skip": ((first, stop),)})
        problems = driver.differences(scratch / f"{i}", skips)
        if status or f"update {batch + 1}: " not in life.said or problems:
            lost.append(f"{policy} at {batch}: status {status}, {problems}: {life.said[-1000:]}")
    return Outcome(lost)


def _copies(seed: int) -> training.TrainState:
    config = driver.tiny()
    model = run_config.validate(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    optimizer = make_optimizer(config.optimizer, lambda step: 0.01)
    like = training.abstract_state(model, optimizer, mesh)
    return training.init_state(model, optimizer, seed, like)


def flipped_bits(scratch: Path, tries: int, seed: int) -> Outcome:
    """One bit of the copy that one of four devices holds: the array and the device are named."""
    lost, state = [], _copies(seed)
    replicas.require_equal(state, 0)
    for i in range(tries):
        changed, name, device = values.flipped(state, seed + i)
        try:
            replicas.require_equal(changed, i)
            lost.append(f"{name} on device {device}: not found")
        except NonFiniteError as error:
            if f"{name} " not in str(error) or f"of [{device}]" not in str(error):
                lost.append(f"{name} on device {device}: {error}")
    return Outcome(lost)


def flipped_in_a_run(scratch: Path, tries: int, seed: int) -> Outcome:
    """The same in train.py, which compares the copies now and then."""
    config = driver.tiny(**{"guard.replica_interval": 5, "train.num_steps": 10 + 5 * tries})

    def at(i: int) -> tuple[str, Callable[[Trainer], bool]]:
        def strike(life: Trainer) -> bool:
            assert life.end() == 6 and "cannot be trusted" in life.said, life.said[-1000:]
            return True

        return f"flip:{8 + 5 * i}:{seed + i}", strike

    return chain(scratch, config, [at(i) for i in range(tries)][::-1], devices=4)


def no_false_report(scratch: Path, tries: int, seed: int) -> Outcome:
    """As many updates on four devices, whose copies are compared after each."""
    length = {"train.num_steps": tries, "checkpoint.interval": 0, "log_interval": 1000}
    config = driver.tiny(**length, **{"guard.replica_interval": 1})
    with Trainer(config, scratch / "run", devices=4) as life:
        status = life.end(1500)
    return Outcome([f"status {status}: {life.said[-1000:]}"] * tries if status else [])
