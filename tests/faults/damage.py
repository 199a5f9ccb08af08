"""Damaged checkpoints: what was saved is restored, or an older one and it is said, or nothing."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megabyte_jax import checkpoint, run_config, sharding, training
from megabyte_jax.errors import CheckpointError
from megabyte_jax.optimizer import make_optimizer
from tests import runs
from tests.faults import driver
from tests.faults.driver import Outcome

Restored = tuple[int, list[bytes]] | None


def _flip(path: Path, moments: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, moments: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: moments.randrange(max(path.stat().st_size, 1))])


def _zero(path: Path, moments: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = moments.randrange(max(len(data), 1))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def _delete(path: Path, moments: random.Random) -> None:
    path.unlink()


def _append(path: Path, moments: random.Random) -> None:
    path.write_bytes(path.read_bytes() + moments.randbytes(moments.randint(1, 600)))


def _swap(path: Path, moments: random.Random) -> None:
    files = sorted(p for p in path.parents[1].rglob("*") if p.is_file())
    other = moments.choice(files)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def _forbid(path: Path, moments: random.Random) -> None:
    path.chmod(0)


DAMAGES = (_flip, _truncate, _zero, _delete, _append, _swap, _forbid)


class Reader:
    """Restores copies of a finished run, as train.py does."""

    def __init__(self, scratch: Path) -> None:
        config = driver.tiny()
        model = run_config.validate(config)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        optimizer = make_optimizer(config.optimizer, lambda step: 0.01)
        self._like = training.abstract_state(model, optimizer, mesh)
        self._config, self.scratch, self._whole = config.checkpoint, scratch, driver.whole(config)
        self.steps = runs.saved_steps(self._whole)
        # As Orbax alone reads them.
        self.true = {step: _bytes(runs.saved_state(self._whole, step)) for step in self.steps}

    def restore_after(self, harm: Callable[[Path], Any]) -> tuple[Restored, str]:
        """The step and the arrays that come back after some harm, and what was said of it."""
        workdir, said = self.scratch / "run", io.StringIO()
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(self._whole / "checkpoints", workdir / "checkpoints")
        harm(workdir / "checkpoints")
        facts = {"skip": (), "environment": {}}
        with contextlib.redirect_stderr(said):
            with checkpoint.Checkpoints(workdir, self._config, facts) as checkpoints:
                found = checkpoints.restore(self._like)
        if not found:
            return None, said.getvalue()
        state = found[0]._asdict()
        arrays = _bytes({name: state[name] for name in ("params", "opt_state")})
        return (int(state["step"]), arrays), said.getvalue()


def _bytes(tree: Any) -> list[bytes]:
    return sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))


def files(scratch: Path, tries: int, seed: int) -> Outcome:
    """A random file of the newest checkpoint: never a wrong array, and the other is used."""
    reader, moments, lost = Reader(scratch), random.Random(seed), []
    older, newest = reader.steps
    for i in range(tries):
        damage = DAMAGES[i % len(DAMAGES)]
        chosen = []

        def harm(folder: Path, damage: Any = damage, chosen: list[Path] = chosen) -> None:
            paths = sorted(p for p in (folder / str(newest)).rglob("*") if p.is_file())
            chosen.append(moments.choice(paths))
            damage(chosen[0], moments)

        what = f"{damage.__name__} "
        try:
            found, said = reader.restore_after(harm)
        except Exception as error:
            lost.append(f"{what}{chosen}: {type(error).__name__}: {error}")
            continue
        right = found in [(step, reader.true[step]) for step in reader.steps]
        told = found and (found[0] == newest or f"checkpoint {newest} cannot be " in said)
        if not right or not told:
            lost.append(f"{what}{chosen}: update {found and found[0]}, {right=}: {said}")
    return Outcome(lost)


def directories(scratch: Path, tries: int, seed: int) -> Outcome:
    """Steps that are renamed, linked, emptied or no steps at all; `tries` is their number."""
    reader = Reader(scratch)
    older, newest = reader.steps
    gone = CheckpointError

    def only(name: str) -> Callable[[Path], Any]:
        def harm(folder: Path) -> None:
            shutil.rmtree(folder / str(older))
            (folder / str(newest)).rename(folder / name)

        return harm

    def file_named_4(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "4").write_text("")

    def linked(folder: Path) -> None:
        shutil.rmtree(folder / str(newest))
        (folder / str(newest)).symlink_to(folder / str(older))

    def each(harm: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda folder: [harm(path) for path in list(folder.iterdir())]

    def unfinished(folder: Path) -> None:
        only(f"{newest}.orbax-checkpoint-tmp")(folder)

    cases: dict[str, tuple[Callable[[Path], Any], Any]] = {
        "the newest renamed": (lambda f: (f / str(newest)).rename(f / "99999"), older),
        "the newest a link": (linked, older),
        "the newest empty": (lambda f: shutil.rmtree(f / str(newest) / "params"), older),
        "no optimizer's state": (lambda f: shutil.rmtree(f / str(newest) / "opt_state"), older),
        "no manifest": (lambda f: shutil.rmtree(f / str(newest) / "manifest"), older),
        "all without a manifest": (each(lambda path: shutil.rmtree(path / "manifest")), gone),
        "all without parameters": (each(lambda path: shutil.rmtree(path / "params")), gone),
        "only one renamed": (only("7"), gone),
        "only 007": (only("007"), gone),
        "only -5": (only("-5"), gone),
        "only a file named 4": (file_named_4, gone),
        "only a save that did not end": (unfinished, None),
        "nothing": (lambda f: shutil.rmtree(f), None),
    }
    assert tries == len(cases)
    lost = []
    for name, (harm, expected) in cases.items():
        try:
            found, said = reader.restore_after(harm)
            right = (found and found[0]) == expected
            right &= found is None or found[1] == reader.true[found[0]]
        except CheckpointError as error:
            right, said = expected is gone, str(error)
        lost += [] if right else [f"{name}: {said}"]
    return Outcome(lost)
