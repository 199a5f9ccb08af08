import shutil

import jax
import numpy as np
import pytest

from megabyte_jax import checkpoint, sharding, training
from megabyte_jax.errors import CheckpointError, NonFiniteError, StorageError
from megabyte_jax.optimizer import make_optimizer
from megabyte_jax.training import TrainState
from tests import runs

# Orbax leaves reads behind when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def opened(workdir, skip=(), **changes):
    config = runs.tiny_config("stdlib", **changes).checkpoint
    return checkpoint.Checkpoints(workdir, config, {"skip": skip, "environment": {}})


def state_of(step):
    array = {"a": jax.numpy.full(3, step, jax.numpy.float32)}
    return TrainState(jax.numpy.int32(step), array, array)


def test_the_newest_checkpoints_are_kept_and_some_for_good(tmp_path, capsys):
    with opened(tmp_path, **{"checkpoint.keep_interval": 3}) as checkpoints:
        assert checkpoints.restore(state_of(0)) is None
        for step in range(1, 8):
            checkpoints.save(state_of(step))
    assert runs.saved_steps(tmp_path) == [3, 6, 7]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"update {step}: checkpoint saved and verified" for step in range(1, 8)]


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
    with opened(tmp_path) as checkpoints:
        checkpoints.save(placed)
    for shape in MESHES:
        target = like(shape)
        with opened(tmp_path) as checkpoints:
            restored, _ = checkpoints.restore(target)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, target
        )


@pytest.mark.parametrize("name", ["007", "-5", "4.damaged.1", "six"])
def test_what_may_have_been_a_checkpoint_is_no_fresh_start(tmp_path, name):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with opened(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=name):
        checkpoints.restore(state_of(0))


def test_a_state_of_other_skipped_batches_is_not_gone_on_from(tmp_path, capsys):
    with opened(tmp_path, skip=((2, 4),)) as checkpoints:
        for step in (2, 3):
            checkpoints.save(state_of(step))
    with opened(tmp_path, skip=((7, 9),)) as checkpoints:
        restored, body = checkpoints.restore(state_of(0))
    assert int(restored.step) == 2 and body["skipped"] == []
    assert "checkpoint 3 cannot be read: it is from before" in capsys.readouterr().err


def test_a_save_that_fails_is_told_at_once_and_the_third_ends_the_run(
    tmp_path, monkeypatch, capsys
):
    with opened(tmp_path) as checkpoints:
        checkpoints.save_now(state_of(1))
        with monkeypatch.context() as patch:
            full = OSError(28, "No space left on device")
            patch.setattr(checkpoint.manifest, "verify", lambda *_: (_ for _ in ()).throw(full))
            for step in (2, 3):
                checkpoints.save(state_of(step))
                checkpoints.finish()
                said = f"update {step}: checkpoint NOT saved: No space left on device; the last is"
                assert f"{said} that of update 1" in capsys.readouterr().err
        checkpoints.save_now(state_of(4))
        assert runs.saved_steps(tmp_path) == [1, 4]
        monkeypatch.setattr(checkpoint.manifest, "verify", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(StorageError, match="3 checkpoints in a row .*No space.* update 4"):
            checkpoints.save_now(state_of(5))
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if "tmp" in p.name]


def test_what_is_not_finite_is_never_saved(tmp_path):
    state = state_of(1)
    for bad in (
        state._replace(params={"a": state.params["a"].at[1].set(np.nan)}),
        state._replace(opt_state={"a": state.params["a"].at[2].set(np.inf)}),
    ):
        with opened(tmp_path) as checkpoints, pytest.raises(NonFiniteError, match="update 1"):
            checkpoints.save(bad)
    assert runs.saved_steps(tmp_path) == []


def test_going_back_removes_what_came_after_and_never_the_last_way_back(tmp_path):
    with opened(tmp_path, **{"checkpoint.interval": 2}) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save_now(state_of(step))
        with pytest.raises(NonFiniteError, match=r"only \[4, 6\]"):
            checkpoints.forget(after=3)
        checkpoints.forget(after=5)
        assert runs.saved_steps(tmp_path) == [4]
        checkpoints.forget(after=1)  # of which there never was one
    assert runs.saved_steps(tmp_path) == []


def test_too_little_space_is_told_before_anything_is_compiled(tmp_path, monkeypatch):
    config = runs.tiny_config("x").checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(99, 27, 72))
    checkpoint.require_space(tmp_path, config, state_of(0)._replace(step=np.zeros(0)))
    with pytest.raises(StorageError, match="72 bytes are free; needed are 84, as .* takes 28"):
        checkpoint.require_space(tmp_path, config, state_of(0))
