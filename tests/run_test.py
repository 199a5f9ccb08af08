import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax import run
from megabyte_jax.errors import StorageError, UserError
from megabyte_jax.preemption import Preemption
from tests import runs


def prepared(config, workdir, devices=1):
    devices = jax.devices()[:devices]
    return run.prepare(config, str(workdir), devices, Preemption(), accept_config_change=False)


def test_it_knows_what_the_config_the_data_and_the_devices_say(text_dir, tmp_path):
    made = prepared(runs.tiny_config(text_dir, **{"mesh.data": 2}), tmp_path / "run", devices=2)
    assert (made.steps, made.batch_shape, made.suffix) == (6, (4, runs.T), ".txt")
    assert made.batch_sharding.num_devices == made.mesh.size == 2
    assert made.like.step.shape == () and made.sampler.corpus is made.splits["train"]
    assert sorted(path.name for path in made.directory.iterdir()) == ["config.json", "data.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mesh.data": 3}, "3"),
        ({"train.batch_size": 0}, "train.batch_size"),
        ({"data.source": "/no/such"}, "/no/such"),
    ],
)
def test_what_cannot_be_used_leaves_nothing_on_the_disk(change, message, text_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        prepared(runs.tiny_config(text_dir, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_little_room_is_told(text_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run.checkpoint.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 9})
    )
    with pytest.raises(StorageError, match="9 bytes are free"):
        prepared(runs.tiny_config(text_dir), tmp_path / "run")


@pytest.fixture(scope="module")
def made(text_dir, tmp_path_factory):
    return prepared(runs.tiny_config(text_dir), tmp_path_factory.mktemp("due") / "run")


@given(step=st.integers(0, 6), interval=st.integers(0, 8))
def test_what_is_due_is_so_every_interval_and_at_the_end(made, step, interval):
    multiples = range(interval, 6, interval) if interval else ()
    assert made.due(step, interval) == (step in (6, *multiples))
