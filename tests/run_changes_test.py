import json

import pytest

from megabyte_jax import config_keys, run_config
from megabyte_jax.errors import UserError
from tests import runs

STAGES = ("global", "local")
# What a run that goes on says to each key.
REFUSED = """seed train.batch_size optimizer.name optimizer.state_dtype data.source data.modality
data.separator data.tfds.feature data.image.height data.image.width data.image.scan
data.image.resize data.audio.sample_rate data.split.by data.split.valid_size data.split.test_size
data.split.train data.split.valid data.split.test model.seq_len model.patch_size model.cross_patch
model.conv_kernels model.byte_positions model.local_positions model.init model.param_dtype"""
STACK = "dim num_layers num_heads head_dim num_kv_heads mlp_dim norm activation bias qk_norm rope"
REFUSED = {*REFUSED.split(), *(f"model.{s}_model.{f}" for s in STAGES for f in STACK.split())}
ACCEPT = """train.grad_accumulation train.num_bytes train.num_steps optimizer.learning_rate
optimizer.schedule optimizer.end_fraction optimizer.warmup_steps optimizer.warmup_bytes optimizer.b1
optimizer.b2 optimizer.eps optimizer.weight_decay optimizer.clip_norm guard.policy guard.max_loss
guard.max_grad_norm guard.rollback_window guard.max_skips model.dtype model.global_model.dropout
model.local_model.dropout"""
FREE = """data.max_bad_records data.cache_dir data.workers data.tfds.data_dir mesh.data mesh.fsdp
mesh.sequence mesh.tensor train.skip optimizer.offload guard.replica_interval watchdog.step_seconds
watchdog.data_seconds watchdog.pause_seconds watchdog.peer_seconds log_interval eval.interval
eval.batch_size eval.num_bytes sample.interval sample.prompt sample.num_bytes sample.temperature
checkpoint.interval checkpoint.keep checkpoint.keep_interval model.group_size
model.global_model.remat model.global_model.scan_unroll model.local_model.remat
model.local_model.scan_unroll"""
# Where neither another choice nor one more would do.
OTHER = {
    "data.modality": "audio",
    "data.image.scan": "raster",
    "data.image.resize": "box",
    "data.split.by": "name",
    "mesh.data": 2,
    "train.batch_size": 8,
    "train.grad_accumulation": 4,
    "train.skip": ((3, 5),),
    "optimizer.name": "muon",
    "optimizer.schedule": "cosine",
    "optimizer.state_dtype": "bfloat16",
    "guard.policy": "skip_update",
    "model.seq_len": 48,
    "model.patch_size": 8,
    "model.conv_kernels": (3, 5),
    "model.init": "scaled",
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.global_model.dim": 32,
    "model.local_model.dim": 24,
    "model.global_model.num_heads": 4,
    "model.local_model.num_heads": 4,
    "mlp_dim": 40,
    "head_dim": 8,
    "norm": "rmsnorm",
    "activation": "gelu",
    "remat": "full",
}


def changed(key):
    """The tiny config with another value of a key, and what stands in a line about it."""
    old = dict(run_config.flatten(runs.tiny_config("stdlib")))[key]
    new = OTHER.get(key, OTHER.get(key.split(".")[-1]))
    if new is None:
        if isinstance(old, bool):
            new = not old
        else:
            new = {int: lambda: old + 1, float: lambda: old * 0.5 + 0.25, str: lambda: f"{old}x"}[
                type(old)
            ]()
    return runs.tiny_config("stdlib", **{key: new})


def went_on(workdir, config, accept):
    """How a run says to go on: its lines on stderr are the test's to read."""
    try:
        run_config.open_workdir(str(workdir), config, {}, accept_config_change=accept)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", sorted(run_config.flatten(runs.tiny_config("stdlib"))))
def test_a_run_that_goes_on_says_to_every_key_what_the_table_of_the_tests_says(
    key, tmp_path, capsys
):
    run_config.open_workdir(str(tmp_path), runs.tiny_config("stdlib"), {})
    config = changed(key)
    run_config.validate(config)
    before, first = runs.contents(tmp_path), went_on(tmp_path, config, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{key}: ") and " -> " in line
    if key in FREE.split():
        assert first == "" and line.endswith(" (free)")
    else:
        assert runs.contents(tmp_path) == before
        second = went_on(tmp_path, config, True)
    if key in ACCEPT.split():
        assert f"other values of {key};" in first and "--accept_config_change" in first
        assert second == "" and line.endswith(" (needs --accept_config_change)")
    elif key in REFUSED:
        assert first == second and f"holds another run, with {key}=" in first
        assert line.endswith(" (refused)") and runs.contents(tmp_path) == before
    else:
        assert key in FREE.split()


def test_every_key_is_in_one_class_of_the_table_of_the_tests():
    classes = [*REFUSED, *ACCEPT.split(), *FREE.split()]
    assert sorted(classes) == sorted(run_config.flatten(runs.tiny_config("stdlib")))
    assert config_keys.KEYS.keys() <= set(classes)


def test_a_run_takes_the_new_config_as_its_own(tmp_path, capsys):
    run_config.open_workdir(str(tmp_path), runs.tiny_config("stdlib"), {})
    changes = {"train.num_steps": 99, "optimizer.b1": 0.5, "log_interval": 7}
    config = runs.tiny_config("stdlib", **changes)
    refused = went_on(tmp_path, config, False)
    assert "other values of optimizer.b1, train.num_steps; accepted are the same" in refused
    assert capsys.readouterr().err.splitlines() == [
        "log_interval: 1 -> 7 (free)",
        "optimizer.b1: 0.9 -> 0.5 (needs --accept_config_change)",
        "train.num_steps: 6 -> 99 (needs --accept_config_change)",
    ]
    assert went_on(tmp_path, config, True) == "" and capsys.readouterr().err.count("\n") == 3
    assert run_config.load(tmp_path).to_dict() == runs.as_json(config)
    assert went_on(tmp_path, config, False) == "" and capsys.readouterr().err == ""


def test_all_that_makes_it_another_run_is_named(tmp_path):
    run_config.open_workdir(str(tmp_path), runs.tiny_config("stdlib"), {})
    other = runs.tiny_config("stdlib", **{"seed": 99, "train.batch_size": 8, "log_interval": 9})
    said = went_on(tmp_path, other, True)
    assert "with seed=0 where the config has 99 (and others: train.batch_size)" in said


def test_a_run_from_before_a_key_goes_on_with_what_its_version_did(tmp_path, capsys):
    old = runs.as_json(runs.tiny_config("stdlib"))
    del old["guard"], old["train"]["skip"], old["model"]["group_size"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert run_config.validate(run_config.load(tmp_path)) == runs.tiny_model(dropout=0.1)
    limited = runs.tiny_config("stdlib", **{"guard.max_loss": 9.5})
    assert "other values of guard.max_loss;" in went_on(tmp_path, limited, False)
    capsys.readouterr()
    assert went_on(tmp_path, runs.tiny_config("stdlib"), False) == ""
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 7 and "train.skip: [] (by default: newer than the run) -> [] (free)" in said
    assert run_config.load(tmp_path).to_dict() == runs.as_json(runs.tiny_config("stdlib"))


def test_a_key_of_a_later_version_makes_it_another_run(tmp_path):
    later = runs.as_json(runs.tiny_config("stdlib"))
    later["optimizer"]["momentum"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(later))
    said = went_on(tmp_path, runs.tiny_config("stdlib"), True)
    assert "with optimizer.momentum=0.5 where the config has nothing" in said
