"""A config is a program, run when the flag is parsed: only one that the user has chosen."""

import json

import pytest

from tests import runs
from tests.security import hostile

PROGRAM = "open('ran', 'w').close()\nfrom configs.base import get_config\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with a program in it and one in a work directory below."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for folder in (".", "run"):
        (tmp_path / folder / "evil.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize(
    "given",
    [
        ["--config=evil.py"],
        ["-config=evil.py"],
        ["--config", "evil.py"],
        ["--config=evil.py:small"],
        ["--config=run/evil.py"],
        ["--config=./run/../run/evil.py"],
        ["--config=configs/../run/evil.py", "--config.seed=1"],
    ],
    ids=str,
)
def test_a_program_that_is_not_clearly_chosen_is_not_run(here, capfd, given):
    (here / "configs").mkdir()
    assert runs.run_main("train", *given, "--workdir=new") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "evil.py" in err and "is a program that would be run" in err
    assert not (here / "ran").exists() and not (here / "new").exists()


def test_a_program_that_is_chosen_is_run_before_anything_else(here, capfd):
    assert runs.run_main("train", "--config=./evil.py", "--workdir=") == 2
    assert "--workdir=" in capfd.readouterr().err or (here / "ran").exists()
    assert (here / "ran").exists()


@pytest.mark.parametrize("key", ["seed", "train.skip", "data.source", "mesh.data", "sample.prompt"])
@pytest.mark.parametrize(
    "value", ["open('ran','w')", "__import__('os').system('touch ran')", "(open('ran','w'),)"]
)
def test_a_value_is_never_run(here, capfd, key, value):
    given = f"--config={runs.ROOT}/configs/base.py", f"--config.{key}={value}"
    assert runs.run_main("train", *given, "--config.data.source=/no/such", "--workdir=new") == 2
    assert not (here / "ran").exists() and not (here / "new").exists()


def test_what_is_compiled_is_kept_nowhere_and_nothing_is_imported_from_here(here):
    hostile.plant(here, here / hostile.MARK)
    code = "import sys; sys.path.remove('')\nimport megabyte_jax.trained, jax, json\n"
    code += "print(json.dumps([jax.config.jax_compilation_cache_dir, *sys.path]))"
    cache, *path = json.loads(hostile.python(code, here, "JAX_COMPILATION_CACHE_DIR"))
    assert cache is None and str(here) not in path
    assert not (here / hostile.MARK).exists()
