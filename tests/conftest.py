"""How JAX runs under test; set in the environment, before anything imports jax."""

import gc
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest

from tests import xla

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

# Of a config that is run, Python would leave a compiled copy beside it.
sys.dont_write_bytecode = True
# A shell that names another backend keeps it, so that the same tests can run on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on any machine: what holds on one device must hold on a mesh.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(8)}".strip()
# Collectives of the eight block a thread each, and with as many threads as this machine has cores
# they wait for each other for ever.
os.environ.setdefault("NPROC", "64")
# Compiled steps outlive the process, so the second run of the tests compiles nothing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Shapes that broadcast by accident are how a wrong model trains without complaint.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Forty documents of text, 18 to 290 bytes long."""
    directory = tmp_path_factory.mktemp("text")
    words = "the a of megabyte patch global local byte\n été ∑ model".split(" ")
    for i in range(40):
        text = " ".join(words[(i * j) % len(words)] for j in range(i * 7 % 50 or 3))
        (directory / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def finished_run(text_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work directory of a tiny run that nothing interrupted; not to be changed."""
    from tests import runs

    workdir = tmp_path_factory.mktemp("finished") / "run"
    runs.train(runs.tiny_config(text_dir), workdir)
    return workdir


@pytest.fixture
def damage() -> Iterator[Callable[[pathlib.Path], None]]:
    """Cuts every array file of a checkpoint in half."""
    from tests import runs

    yield runs.cut_in_half
    # Orbax leaves reads behind when one fails; they are to go here and not in a later test.
    gc.collect()
