"""A tiny model and run for the tests, and the entry points called inside this process."""

import functools
import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import flags
from ml_collections import ConfigDict

from configs import base
from megabyte_jax import cli
from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.models import functional
from megabyte_jax.models.config import MegabyteConfig, TransformerConfig

ROOT = Path(__file__).parents[1]
P, T = 4, 24
FLAGS_OF_LIBRARIES = frozenset(flags.FLAGS)


def tiny_model(dropout: float = 0.0, init: str = "paper") -> MegabyteConfig:
    return MegabyteConfig(
        seq_len=T,
        patch_size=P,
        global_model=TransformerConfig(dim=16, num_layers=2, num_heads=2, dropout=dropout),
        local_model=TransformerConfig(dim=12, num_layers=1, num_heads=3, dropout=dropout),
        init=init,
        dtype="float32",
    )


def tiny_config(source: Path | str, **changes: Any) -> ConfigDict:
    """Six updates with dropout in two parts each, a checkpoint after every second."""
    config = base.get_config()
    config.model = base.model(tiny_model(dropout=0.1))
    config.data.source = str(source)
    config.data.split.update(valid_size=0.2, test_size=0.2)
    config.train.update(batch_size=4, grad_accumulation=2, num_bytes=0, num_steps=6)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
    config.log_interval = 1
    config.eval.update(interval=3, batch_size=8, num_bytes=500)
    config.sample.update(interval=0, num_bytes=3)
    config.checkpoint.interval = 2
    config.update_from_flattened_dict(changes)
    return config


def as_json(config: ConfigDict) -> Any:
    """A config as it comes back from its file."""
    return json.loads(json.dumps(config.to_dict()))


def corpus_of(*documents: bytes) -> Corpus:
    views = [np.frombuffer(data, np.uint8) for data in documents]
    return Corpus("c", tuple(Document(f"{i}", v, 0, len(v)) for i, v in enumerate(views)))


def entry_point(script: str) -> dict[str, Any]:
    """What a script defines; its flags take the place of those of the script before."""
    for name in set(flags.FLAGS) - FLAGS_OF_LIBRARIES:
        delattr(flags.FLAGS, name)
    return runpy.run_path(str(ROOT / f"{script}.py"))


def train(config: ConfigDict, workdir: Path, num_devices: int = 1, **options: Any) -> None:
    devices = jax.devices()[:num_devices]
    entry_point("train")["train"](config, str(workdir), devices, **options)


def run_main(script: str, *args: str) -> Any:
    """Runs a script on command-line arguments, on one device, and returns its exit status."""
    main, argv, one = entry_point(script)["main"], sys.argv, jax.devices()[:1]
    sys.argv = [f"{script}.py", *args]
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda: one)
            warnings.filterwarnings("ignore", "the load_module")  # ml_collections calls it
            cli.run(main)
    except SystemExit as exit:
        return exit.code or 0
    finally:
        sys.argv = argv


def records(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def saved_state(workdir: Path, step: int) -> Any:
    """Nested dicts of the arrays in a checkpoint, read with Orbax alone."""
    directory = workdir.absolute() / "checkpoints" / str(step)
    names = ("params", "opt_state")
    with ocp.StandardCheckpointer() as reader:
        return {name: reader.restore(directory / name) for name in names}


def cut_in_half(checkpoint: Path) -> None:
    """Cuts every array file of a checkpoint in half."""
    for path in array_files(checkpoint):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def array_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that hold arrays, or shards of them."""
    return [path for path in sorted(checkpoint.rglob("[0-9]*")) if path.is_file()]


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, with the bytes of the files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@functools.partial(jax.jit, static_argnums=0)
def fit(config, params, batches):
    """Parameters after one update on each of uint8 [N, B, T]; bits per byte before each."""
    optimizer = optax.adam(1e-2)

    def step(state, x):
        params, optimizer_state = state
        loss, gradients = jax.value_and_grad(
            lambda params: functional.nll(config, params, x).mean() / np.log(2)
        )(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params, losses
