import ast
import dataclasses
import inspect
import json
import math
import re

import pytest

from configs import base
from megabyte_jax import run_config, sharding
from megabyte_jax.data.corpus import Corpus, open_corpus
from megabyte_jax.data.splits import split_corpus
from megabyte_jax.errors import UserError
from tests import runs

MODEL_FIELDS = {field.name for field in dataclasses.fields(runs.tiny_model())}


def keys(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


DECLARED = {key for key in keys(base.get_config()) if not key.startswith("model.")}


def test_every_declared_key_is_checked_and_every_checked_key_declared():
    assert DECLARED == run_config.CHECKS.keys()
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
    code = "".join(path.read_text() for path in files if path.name != "run_config.py")
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


def test_the_budget_may_change_on_a_resume_and_what_was_seen_not(tmp_path):
    run_config.open_workdir(str(tmp_path), runs.tiny_config("stdlib"), {})
    longer = runs.tiny_config("stdlib", **{"train.num_steps": 99})
    run_config.open_workdir(str(tmp_path), longer, {})
    assert run_config.load(tmp_path).train.num_steps == 99
    changes = {"model.local_model.dim": 24, "seed": 99, "train.batch_size": 8, "data.source": "x"}
    changes["data.split.test_size"] = 0.4
    for key, value in changes.items():
        other = runs.tiny_config("stdlib", **{key: value})
        with pytest.raises(UserError, match=f"holds another run, with {key}=.*{value}"):
            run_config.open_workdir(str(tmp_path), other, {})
    assert run_config.load(tmp_path).to_dict() == as_json(longer)


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
