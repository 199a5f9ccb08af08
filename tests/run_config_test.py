import ast
import dataclasses
import inspect
import json
import math
import re

import pytest
from ml_collections import ConfigDict

from configs import base
from megabyte_jax import config_keys, run_config, sharding
from megabyte_jax.data.corpus import Corpus, open_corpus
from megabyte_jax.data.splits import split_corpus
from megabyte_jax.errors import UserError
from tests import runs

STAGES = ("global", "local")
MODEL_FIELDS = {field.name for field in dataclasses.fields(runs.tiny_model())}


def keys(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


DECLARED = {key for key in keys(base.get_config()) if not key.startswith("model.")}


def test_every_declared_key_is_checked_and_every_checked_key_declared():
    assert DECLARED == config_keys.KEYS.keys()
    assert set(base.get_config().model) == MODEL_FIELDS


@pytest.mark.parametrize("key", sorted(DECLARED))
def test_every_key_has_a_reader(key):
    name = key.split(".")[-1]
    if key.startswith("data.split."):
        assert name in inspect.signature(split_corpus).parameters
        return
    if key.startswith("mesh."):
        assert name in sharding.AXES
        return
    files = [*runs.ROOT.glob("*.py"), *(runs.ROOT / "megabyte_jax").rglob("*.py")]
    section = key.split(".")[-2] if "." in key else "config"
    code = "".join(
        path.read_text() for path in files if path.stem not in ("run_config", "config_keys")
    )
    assert re.search(rf"\b{section}\.{name}\b", code)


def attributes(node):
    """Every dotted path that begins at a variable `config`, in code and not in its comments."""
    for part in ast.walk(node):
        names = []
        while isinstance(part, ast.Attribute):
            names.append(part.attr)
            part = part.value
        if names and isinstance(part, ast.Name) and part.id == "config":
            yield ".".join(reversed(names))


def test_every_key_read_is_declared():
    known = {key.rsplit(".", n)[0] for key in DECLARED for n in range(3)} | {"model"}
    methods = {"copy_and_resolve_references", "encode", "items", "to_dict"}
    for path in [*runs.ROOT.glob("*.py"), *(runs.ROOT / "megabyte_jax").glob("*.py")]:
        for key in attributes(ast.parse(path.read_text())):
            # Elsewhere `config` is that of a model.
            model = path.stem not in ("train", "eval", "run_config")
            assert key in known or key.split(".")[-1] in methods or model, (path, key)


WRONG = [
    ("optimizer.learning_rate", [-1.0, 0.0, math.nan, math.inf]),
    ("optimizer.weight_decay", [-0.1, math.nan, math.inf]),
    ("optimizer.clip_norm", [0.0, math.nan, -1.0]),
    ("optimizer.b1", [-0.1, 1.0, math.nan]),
    ("optimizer.b2", [1.5]),
    ("optimizer.eps", [0.0, math.inf]),
    ("optimizer.end_fraction", [-0.5, 1.0]),
    ("optimizer.schedule", ["steps", ""]),
    ("optimizer.warmup_steps", [-1]),
    ("train.batch_size", [0, -4]),
    ("train.grad_accumulation", [0, 3]),
    ("train.num_steps", [-1, 2**31]),
    ("data.split.by", ["folder"]),
    ("data.split.train", [""]),
    ("data.max_bad_records", [-1]),
    ("data.workers", [-1, 1024]),
    ("data.image.resize", ["cubic"]),
    ("data.split.valid_size", [-0.1, math.nan]),
    ("data.source", [""]),
    ("data.modality", ["text", ""]),
    ("data.image.height", [0, 2**13]),
    ("data.image.width", [0]),
    ("data.image.scan", ["hilbert"]),
    ("data.audio.sample_rate", [0, -1]),
    ("seed", [-1, 2**32]),
    ("log_interval", [0]),
    ("sample.temperature", [-1.0, math.inf]),
    ("checkpoint.keep", [0]),
]


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG for value in values])
def test_a_value_out_of_range_is_named_with_what_is_accepted(key, value):
    config = runs.tiny_config("stdlib", **{key: value})
    with pytest.raises(UserError) as error:
        run_config.validate(config)
    message = str(error.value)
    assert message.startswith(f"{key}={value!r}: accepted is ") and "\n" not in message


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("model.seq_len", 23, "model.seq_len=23: accepted is a multiple of patch_size=4"),
        ("model.global_model.dim", 18, "model.global_model.dim=18: accepted is a multiple of"),
        ("model.local_model.dim", 13, "model.local_model.dim=13: accepted is a multiple of"),
        ("model.local_model.dropout", 1.0, "model.local_model.dropout=1.0: accepted is"),
        ("model.patch_size", 0, "model.patch_size=0: accepted is"),
        ("model.dtype", "float8", "model.dtype='float8': accepted is one of"),
    ],
)
def test_a_model_that_cannot_be_is_named_by_its_key(key, value, named):
    with pytest.raises(UserError, match=re.escape(named)):
        run_config.validate(runs.tiny_config("stdlib", **{key: value}))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"data.split.valid_size": 2.0}, "^data.split.valid_size=2.0: accepted: a fraction"),
        ({"data.split.test_size": 0.9}, "^data.split.valid_size=0.2 and data.split.test_size=0.9"),
        ({"data.split.by": "bytes", "data.split.test_size": 1.5}, "^data.split.test_size=1.5: acc"),
        ({"train.batch_size": 2**30, "model.seq_len": 4096}, "^train.batch_size=.*268435456 seq"),
        (
            {"model.global_model.dim": 2**19, "model.global_model.num_layers": 99},
            "^model: .* 2..44",
        ),
        ({"train.skip": ((0, 5), (3, True))}, "^train.skip=.*: accepted is .*first, stop"),
        ({"train.skip": ((0, 1),) * 10_001}, "^train.skip=.{200}.* at most 10000$"),
        ({"sample.temperature": 1e-9}, "^sample.temperature=1e-09: accepted is .* or 0$"),
        ({"data.source": "a\0b"}, "^data.source='a.x00b': accepted is stdlib, .*4095 bytes$"),
        ({"data.cache_dir": "x" * 4096}, "^data.cache_dir='xxx.{1,400} bytes$"),
        ({"sample.prompt": "\ud800"}, "^sample.prompt='.ud800': accepted is text of at most"),
    ],
)
def test_what_is_out_of_every_proportion_is_told_in_a_short_line(changes, named):
    with pytest.raises(UserError, match=named) as error:
        run_config.validate(runs.tiny_config("stdlib", **changes))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [None, 5, {}, [], ConfigDict(), ConfigDict({"model": 3}), "x"])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(UserError, match="^--config=.*: .*; accepted is a ConfigDict with the keys"):
        run_config.validate(config)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({}, "model.patch_size=4: accepted is 3 times a square, such as 12"),
        ({"model.patch_size": 12, "data.image.height": 63}, "data.image.height=63: accepted is a"),
        ({"model.patch_size": 12, "data.image.width": 5}, "width=5: accepted is a multiple of 2"),
    ],
)
def test_an_image_that_a_patch_scan_cannot_cut_is_named(changes, named):
    changes = {"model.global_model.dim": 24, "data.modality": "image"} | changes
    with pytest.raises(UserError, match=re.escape(named)):
        run_config.validate(runs.tiny_config("stdlib", **changes))
    for other in ({"data.image.scan": "raster"}, {"data.modality": "bytes"}):
        run_config.validate(runs.tiny_config("stdlib", **changes | other))


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_images_and_sounds_are_neither_cut_nor_separated(modality):
    raster = {"data.modality": modality, "data.image.scan": "raster"}
    run_config.validate(runs.tiny_config("stdlib", **raster))
    cut = runs.tiny_config("stdlib", **raster, **{"data.split.by": "bytes"})
    with pytest.raises(UserError, match="data.split.by='bytes': accepted is document or name for"):
        run_config.validate(cut)
    separated = runs.tiny_config("stdlib", **raster, **{"data.separator": "x"})
    with pytest.raises(UserError, match="^data.separator='x': accepted is none for .*modality="):
        run_config.validate(separated)


def test_a_missing_and_an_unknown_key_are_named():
    config = runs.tiny_config("stdlib")
    with config.unlocked():
        config.optimizer.momentum = 0.5
        with pytest.raises(UserError, match="optimizer.momentum: unknown"):
            run_config.validate(config)
        del config.optimizer.momentum, config.seed
        with pytest.raises(UserError, match="^seed: missing"):
            run_config.validate(config)


def as_json(config):
    return json.loads(json.dumps(config.to_dict()))


def test_a_config_comes_back_from_its_work_directory_as_it_was(tmp_path):
    config = runs.tiny_config("stdlib", **{"model.conv_kernels": (3, 5)})
    assert run_config.open_workdir(str(tmp_path / "a/b"), config, {}) == tmp_path / "a/b"
    loaded = run_config.load(tmp_path / "a/b")
    assert loaded.to_dict() == as_json(config)
    assert run_config.validate(loaded) == run_config.validate(config)
    run_config.open_workdir(str(tmp_path / "a/b"), config, {})
    assert list(runs.contents(tmp_path / "a/b")) == ["config.json", "data.json"]


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
    assert DECLARED <= set(classes)


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
    assert run_config.load(tmp_path).to_dict() == as_json(config)
    assert went_on(tmp_path, config, False) == "" and capsys.readouterr().err == ""


def test_all_that_makes_it_another_run_is_named(tmp_path):
    run_config.open_workdir(str(tmp_path), runs.tiny_config("stdlib"), {})
    other = runs.tiny_config("stdlib", **{"seed": 99, "train.batch_size": 8, "log_interval": 9})
    said = went_on(tmp_path, other, True)
    assert "with seed=0 where the config has 99 (and others: train.batch_size)" in said


def test_a_run_from_before_a_key_goes_on_with_what_its_version_did(tmp_path, capsys):
    old = as_json(runs.tiny_config("stdlib"))
    del old["guard"], old["train"]["skip"], old["model"]["group_size"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert run_config.validate(run_config.load(tmp_path)) == runs.tiny_model(dropout=0.1)
    limited = runs.tiny_config("stdlib", **{"guard.max_loss": 9.5})
    assert "other values of guard.max_loss;" in went_on(tmp_path, limited, False)
    capsys.readouterr()
    assert went_on(tmp_path, runs.tiny_config("stdlib"), False) == ""
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 7 and "train.skip: [] (by default: newer than the run) -> [] (free)" in said
    assert run_config.load(tmp_path).to_dict() == as_json(runs.tiny_config("stdlib"))


def test_what_older_versions_did_are_the_defaults_of_today():
    base_values = run_config.flatten(base.get_config())
    assert {name: base_values[name] for name in config_keys.ADDED} == config_keys.ADDED


def test_a_key_of_a_later_version_makes_it_another_run(tmp_path):
    later = as_json(runs.tiny_config("stdlib"))
    later["optimizer"]["momentum"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(later))
    said = went_on(tmp_path, runs.tiny_config("stdlib"), True)
    assert "with optimizer.momentum=0.5 where the config has nothing" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"model": 3}), "\xff"])
def test_a_damaged_config_is_told_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for use in (run_config.load, lambda path: run_config.open_workdir(path, base.get_config(), {})):
        with pytest.raises(UserError, match="--workdir=.*: config.json is damaged; accepted is"):
            use(str(tmp_path))
    assert runs.contents(tmp_path) == {"config.json": text.encode("latin-1")}


def test_a_run_goes_on_only_with_the_data_that_it_began_with(tmp_path, text_dir):
    config = runs.tiny_config(text_dir)
    corpus = open_corpus(str(text_dir))
    splits = {"train": Corpus("c", corpus.documents[2:]), "valid": corpus}
    for _ in range(2):
        run_config.open_workdir(str(tmp_path), config, splits)
    before = runs.contents(tmp_path)
    for documents in (corpus.documents[1:], corpus.documents[3:] + corpus.documents[:1]):
        with pytest.raises(
            UserError, match="^data.source=.*its train split is not what the run in"
        ):
            other = {**splits, "train": Corpus("c", documents)}
            run_config.open_workdir(str(tmp_path), config, other)
    assert runs.contents(tmp_path) == before
    for damaged in ("", "[1]", "{"):
        (tmp_path / "data.json").write_text(damaged)
        with pytest.raises(
            UserError, match="^--workdir=.*: data.json cannot be read .*accepted is"
        ):
            run_config.open_workdir(str(tmp_path), config, splits)


def test_checkpoints_of_an_unknown_model_are_not_written_over(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="--workdir=.*holds checkpoints but no config.json"):
        run_config.open_workdir(str(tmp_path), base.get_config(), {})
