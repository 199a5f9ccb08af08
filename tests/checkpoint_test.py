import shutil

import jax
import numpy as np
import pytest

from megabyte_jax import checkpoint, sharding, training
from megabyte_jax.errors import CheckpointError, UserError
from megabyte_jax.models import functional
from megabyte_jax.optimizer import make_optimizer
from megabyte_jax.training import TrainState
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
@pytest.mark.parametrize("part", ["ocdbt.process_0/d/*", "manifest.ocdbt"])
def test_a_checkpoint_with_a_damaged_file_is_never_used(workdir, damage, harm, part, capsys):
    for path in list((workdir / "checkpoints/6/params").glob(part)):
        harm(path)
    step, params = checkpoint.restore_params(workdir, LIKE)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, runs.saved_state(workdir, 4)["params"])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("checkpoint 6 cannot be read: ")
    assert second == "checkpoint 4 is used instead"


def test_a_step_can_be_asked_for_and_no_other_comes_instead(workdir, damage):
    assert checkpoint.restore_params(workdir, LIKE, 4)[0] == 4
    damage(workdir / "checkpoints/4")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[4\]"):
        checkpoint.restore_params(workdir, LIKE, 4)
    with pytest.raises(
        UserError, match=r"--workdir=.* has no checkpoint 5; .*checkpoints \[4, 6\]"
    ):
        checkpoint.restore_params(workdir, LIKE, 5)


def test_a_save_that_did_not_end_is_no_checkpoint(workdir):
    unfinished = workdir / "checkpoints/8.orbax-checkpoint-tmp-1"
    shutil.copytree(workdir / "checkpoints/6", unfinished)
    assert checkpoint.restore_params(workdir, LIKE)[0] == 6


def test_a_run_without_a_checkpoint_is_told_apart(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=f"--workdir={tmp_path}: has no checkpoint"):
            checkpoint.restore_params(tmp_path, LIKE)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_the_newest_checkpoints_are_kept_and_some_for_good(tmp_path):
    config = runs.tiny_config("x", **{"checkpoint.keep": 1, "checkpoint.keep_interval": 4})
    with checkpoint.open_manager(tmp_path, config.checkpoint) as manager:
        assert checkpoint.restore_state(manager, TrainState(np.int32(0), {}, {})) is None
        for step in range(1, 7):
            array = {"a": jax.numpy.full(3, step)}
            checkpoint.save(manager, TrainState(np.int32(step), array, array))
    assert runs.saved_steps(tmp_path) == [4, 6]


MESHES = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 2), (2, 2, 1, 2), (1, 1, 8, 1), (1, 8, 1, 1)]


@pytest.mark.parametrize("written", [(1, 1, 1, 1), (1, 4, 1, 2)], ids=str)
def test_a_checkpoint_of_one_mesh_is_restored_on_every_other(written, tmp_path):
    config = runs.tiny_config("stdlib")
    model, optimizer = runs.tiny_model(), make_optimizer(config.optimizer, lambda step: 0.01)

    def like(shape):
        sizes = dict(zip(sharding.AXES, shape, strict=True))
        mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(shape)])
        return training.abstract_state(model, optimizer, mesh)

    state = training.init_state(model, optimizer, 0)._replace(step=np.int32(7))
    # As it would be after updates: no moment is zero.
    noise = np.random.default_rng(0)
    state = jax.tree.map(lambda x: noise.normal(size=x.shape).astype(x.dtype), state)
    state = state._replace(step=np.int32(7))
    placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like(written))
    with checkpoint.open_manager(tmp_path, config.checkpoint) as manager:
        checkpoint.save(manager, placed)
    for shape in MESHES:
        target = like(shape)
        with checkpoint.open_manager(tmp_path, config.checkpoint) as manager:
            restored = checkpoint.restore_state(manager, target)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, target
        )
