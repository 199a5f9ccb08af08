import ast
import dataclasses
import inspect
import math
import re

import pytest

from configs import base
from megabyte_jax import config_keys, run_config, sharding
from megabyte_jax.data.splits import split_corpus
from megabyte_jax.errors import UserError
from tests import runs


def keys(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


DECLARED = {key for key in keys(base.get_config()) if not key.startswith("model.")}


def test_every_declared_key_is_checked_and_every_checked_key_declared():
    assert DECLARED == config_keys.KEYS.keys()
    assert set(base.get_config().model) == {
        field.name for field in dataclasses.fields(runs.tiny_model())
    }


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


def test_what_older_versions_did_are_the_defaults_of_today():
    base_values = run_config.flatten(base.get_config())
    assert {name: base_values[name] for name in config_keys.ADDED} == config_keys.ADDED
