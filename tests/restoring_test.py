import shutil

import jax
import numpy as np
import pytest

from megabyte_jax import restoring
from megabyte_jax.errors import CheckpointError, UserError
from megabyte_jax.models import functional
from tests import runs

# Orbax leaves reads behind when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LIKE = jax.eval_shape(lambda: functional.init_params(runs.tiny_model(), jax.random.key(0)))


@pytest.fixture
def workdir(finished_run, tmp_path):
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [cut, empty, remove])
@pytest.mark.parametrize("part", ["params/*/[0-9]*", "params/*/.zarray", "manifest/metadata"])
def test_a_checkpoint_with_a_damaged_file_is_never_used(workdir, damage, harm, part, capsys):
    for path in list((workdir / "checkpoints/6").glob(part)):
        harm(path)
    step, params = restoring.restore_params(workdir, LIKE)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, runs.saved_state(workdir, 4)["params"])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("checkpoint 6 cannot be read: ")
    assert second == "checkpoint 4 is used instead"


def test_a_step_can_be_asked_for_and_no_other_comes_instead(workdir, damage):
    assert restoring.restore_params(workdir, LIKE, 4)[0] == 4
    damage(workdir / "checkpoints/4")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[4\]"):
        restoring.restore_params(workdir, LIKE, 4)
    with pytest.raises(
        UserError, match=r"--workdir=.* has no checkpoint 5; .*checkpoints \[4, 6\]"
    ):
        restoring.restore_params(workdir, LIKE, 5)


def test_a_save_that_did_not_end_is_no_checkpoint(workdir):
    unfinished = workdir / "checkpoints/8.orbax-checkpoint-tmp-1"
    shutil.copytree(workdir / "checkpoints/6", unfinished)
    assert restoring.restore_params(workdir, LIKE)[0] == 6


def test_a_run_without_a_checkpoint_is_told_apart(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=f"--workdir={tmp_path}: has no checkpoint"):
            restoring.restore_params(tmp_path, LIKE)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def spoil(workdir, what):
    """Makes of checkpoint 6 what is none; returns what is to be said of it."""
    newest = workdir / "checkpoints/6"
    first = runs.array_files(newest / "params")[0]
    match what:
        case "renamed":
            newest.rename(newest.with_name("99999"))
            return "checkpoint 99999 cannot be read: it is that of update 6, renamed"
        case "symlinked":
            newest.rename(workdir / "elsewhere")
            newest.symlink_to(workdir / "elsewhere")
            return "checkpoint 6 cannot be read: it is no directory, or a symbolic link"
        case "a link in it":
            first.rename(workdir / "file")
            first.symlink_to(workdir / "file")
            return f"{first.relative_to(newest)} is a symbolic link"
        case "item missing":
            shutil.rmtree(newest / "params")
            return "checkpoint 6 cannot be read: params/byte_embedding/.zarray is missing"
        case "manifest missing":
            shutil.rmtree(newest / "manifest")
            return "checkpoint 6 cannot be read: manifest/metadata is missing"
        case "a bit":
            data = bytearray(first.read_bytes())
            data[len(data) // 2] ^= 4
            first.write_bytes(data)
            return f"{first.relative_to(newest)} is damaged: its digest"
        case "a file more":
            (newest / "params" / "more").touch()
            return "params/more, of 0 bytes, does not belong there"
        case "a file in its place":
            shutil.rmtree(newest)
            newest.touch()
            return "checkpoint 6 cannot be read: it is no directory"


SPOILED = (
    "renamed",
    "symlinked",
    "a link in it",
    "item missing",
    "manifest missing",
    "a bit",
    "a file more",
    "a file in its place",
)


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_no_checkpoint_is_named_and_the_one_before_it_used(workdir, what, capsys):
    said = spoil(workdir, what)
    assert restoring.restore_params(workdir, LIKE)[0] == 4
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), "shape [16], the config asks"),
        (lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), "dtype float32, the config asks"),
    ],
)
def test_an_array_of_another_shape_or_type_is_named_and_not_cast(workdir, change, named, capsys):
    norm = {**LIKE["global_model"]["norm"], "scale": change(LIKE["global_model"]["norm"]["scale"])}
    like = {**LIKE, "global_model": {**LIKE["global_model"], "norm": norm}}
    with pytest.raises(CheckpointError):
        restoring.restore_params(workdir, like)
    assert f"params/global_model.norm.scale has {named}" in capsys.readouterr().err
