"""What a run is made of, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict
from optax import GradientTransformation, Schedule

from megabyte_jax import checkpoint, distributed, run_config, sharding
from megabyte_jax.data import datasets, media
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.windows import TrainWindows
from megabyte_jax.models.config import ModelConfig
from megabyte_jax.optimizer import make_optimizer, make_schedule, num_steps
from megabyte_jax.preemption import Preemption
from megabyte_jax.training import TrainState, abstract_state


class Run(NamedTuple):
    """What a run is made of, from its config, its data and its devices.

    Attributes:
        config: of the run.
        directory: its work directory.
        model: its model.
        mesh: of its devices.
        steps: updates of its budget.
        schedule: learning rate by update.
        optimizer: the optax chain.
        like: shapes, types and places of its state.
        splits: `train` and `valid`.
        sampler: of its batches.
        preemption: which ends it when a signal says so.
    """

    config: ConfigDict
    directory: Path
    model: ModelConfig
    mesh: Mesh
    steps: int
    schedule: Schedule
    optimizer: GradientTransformation
    like: TrainState
    splits: dict[str, Corpus]
    sampler: TrainWindows
    preemption: Preemption

    @property
    def batch_shape(self) -> tuple[int, int]:
        """B, T."""
        return self.config.train.batch_size, self.model.seq_len

    @property
    def batch_sharding(self) -> Sharding:
        """Where a batch lies."""
        return sharding.batch_sharding(self.mesh)

    @property
    def suffix(self) -> str:
        """Of the names of files with samples."""
        return media.SUFFIXES[self.config.data.modality]

    def due(self, step: int, interval: int) -> bool:
        """Whether what is done every `interval` updates, and after the last, is done after one."""
        return step == self.steps or (step > 0 and interval > 0 and step % interval == 0)


def prepare(
    config: ConfigDict,
    workdir: str,
    devices: Sequence[Any],
    preemption: Preemption,
    accept_config_change: bool,
) -> Run:
    """Makes all that a run needs but its state, and checks all that can be checked so early.

    Args:
        config: as `configs/base.py` declares it.
        workdir: the work directory, made if need be.
        devices: of which the mesh is made.
        preemption: which listens to signals, or does not.
        accept_config_change: whether a run goes on with other settings than it began with.

    Raises:
        UserError: the config or the directory cannot be used.
        DataError: the data cannot be read.
        StorageError: there is no room for checkpoints.
    """
    with distributed.together():
        model = run_config.validate(config)
        mesh = sharding.make_mesh(config.mesh, devices)
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
        path = run_config.open_workdir(
            workdir, config, splits, accept_config_change=accept_config_change
        )
        checkpoint.require_space(path, config.checkpoint, like)
    distributed.require_shared(path)
    return Run(
        config, path, model, mesh, steps, schedule, optimizer, like, splits, sampler, preemption
    )
