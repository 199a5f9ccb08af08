import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax.errors import UserError
from megabyte_jax.models.config import (
    ByteTransformerConfig,
    MegabyteConfig,
    TransformerConfig,
    from_mapping,
)
from tests.models.reference import tiny

STACK = {"dim": 24, "num_layers": 2, "num_heads": 3}
BAD_STACKS = [
    ("dim", 0),
    ("dim", 25),
    ("dim", 24.0),
    ("num_layers", 0),
    ("num_layers", True),
    ("num_heads", -1),
    ("head_dim", -1),
    ("num_kv_heads", 2),
    ("mlp_dim", -4),
    ("norm", "batchnorm"),
    ("activation", "sine"),
    ("remat", "some"),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("dropout", float("nan")),
    ("dropout", "a tenth"),
    ("scan_unroll", 0),
    ("bias", "yes"),
    ("rope", "no"),
    ("qk_norm", None),
]
BAD_MODELS = [
    ("seq_len", 0),
    ("seq_len", 21),
    ("seq_len", "20"),
    ("patch_size", 0),
    ("cross_patch", -2),
    ("cross_patch", 5),
    ("cross_patch", 1.5),
    ("conv_kernels", (3, 0)),
    ("conv_kernels", 3),
    ("init", "xavier"),
    ("dtype", "float16"),
    ("byte_positions", "no"),
    ("local_positions", None),
]
BAD_BASELINES = [
    ("seq_len", 0),
    ("seq_len", True),
    ("window", -1),
    ("window", 20),
    ("window", 2.0),
    ("byte_positions", 1),
    ("init", "xavier"),
    ("dtype", "float16"),
]


def message(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, value", BAD_STACKS, ids=str)
def test_a_bad_value_of_a_stack_is_named(name, value):
    text = message(TransformerConfig, **{**STACK, name: value})
    assert text.startswith(f"{name}={value!r}: accepted is ")


@pytest.mark.parametrize("name, value", BAD_MODELS, ids=str)
def test_a_bad_value_of_a_model_is_named(name, value):
    text = message(tiny, **{name: value})
    assert text.startswith(f"{name}=") and "accepted is" in text


def baseline(**fields):
    return ByteTransformerConfig(
        **{"seq_len": 20, "transformer": TransformerConfig(**STACK), **fields}
    )


@pytest.mark.parametrize("name, value", BAD_BASELINES, ids=str)
def test_a_bad_value_of_a_baseline_is_named(name, value):
    text = message(baseline, **{name: value})
    assert text.startswith(f"{name}={value!r}: accepted is ")


def test_a_window_is_shorter_than_the_sequence_and_0_is_none():
    assert "below seq_len=20" in message(baseline, window=20)
    assert [baseline(window=window).window for window in (0, 1, 19)] == [0, 1, 19]


def test_rope_needs_heads_of_even_width():
    assert "head_dim" in message(TransformerConfig, **{**STACK, "head_dim": 5}, rope=True)
    TransformerConfig(**{**STACK, "head_dim": 5})


def as_model(dim, patch_size, num_heads, rope):
    stack = TransformerConfig(dim=dim, num_layers=1, num_heads=num_heads, rope=rope)
    local = TransformerConfig(dim=8, num_layers=1, num_heads=1)
    return MegabyteConfig(
        seq_len=patch_size, patch_size=patch_size, global_model=stack, local_model=local
    )


def works(*args):
    try:
        return as_model(*args)
    except UserError:
        return None


@given(st.integers(1, 60), st.integers(1, 24), st.integers(1, 12), st.booleans())
def test_a_width_that_patches_do_not_divide_names_the_nearest_that_work(
    head_width, patch_size, num_heads, rope
):
    dim = head_width * (1 + rope) * num_heads
    if dim % patch_size == 0:
        assert as_model(dim, patch_size, num_heads, rope).byte_dim * patch_size == dim
        return
    text = message(as_model, dim, patch_size, num_heads, rope)
    assert text.startswith(f"global_model.dim={dim}: ")
    named = {int(number) for number in re.findall(r"\d+", text.partition("nearest")[2])}
    around = range(1, dim + 2 * patch_size * num_heads + 1)
    working = [width for width in around if works(width, patch_size, num_heads, rope)]
    below, above = [w for w in working if w < dim], [w for w in working if w > dim]
    assert named == {*below[-1:], above[0]}


def test_a_width_of_the_paper_that_cannot_be_split_names_its_neighbours():
    text = message(tiny, patch_size=12, seq_len=24, global_model={"dim": 2048, "num_heads": 1})
    assert "2040" in text and "2052" in text


def test_a_config_survives_json():
    config = tiny(conv_kernels=(3, 5), both={"rope": True, "dropout": 0.1}, cross_patch=2)
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_mapping(stored) == config
    assert hash(from_mapping(stored)) == hash(config)


def test_a_config_of_the_baseline_survives_json_and_is_told_by_its_transformer():
    config = baseline(window=7, dtype="float32", byte_positions=False)
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_mapping(stored) == config
    assert hash(from_mapping(stored)) == hash(config)


BAD_STORED_BASELINES = [
    ("window", 20, "model.window=20: accepted is below seq_len=20"),
    ("patch_size", 4, "model.patch_size: unknown; accepted are seq_len, transformer, window"),
    ("global_model", {}, "model.global_model: unknown; accepted are seq_len, transformer"),
    ("transformer", 5, "model.transformer=5: accepted is the fields dim, num_layers"),
    ("transformer", {**STACK, "dim": 25}, "model.transformer.dim=25: accepted is a multiple"),
    ("transformer", {**STACK, "layers": 2}, "model.transformer.layers: unknown; accepted are dim"),
    ("transformer", {"dim": 24}, "model.transformer: "),
]


@pytest.mark.parametrize("name, value, expected", BAD_STORED_BASELINES, ids=str)
def test_the_error_of_a_stored_baseline_gives_the_path(name, value, expected):
    stored = {**dataclasses.asdict(baseline()), name: value}
    assert message(from_mapping, stored).startswith(expected)


@pytest.mark.parametrize(
    "path, value", [("seq_len", 21), ("local_model.dim", 13), ("global_model.dropout", 2)]
)
def test_the_error_of_a_stored_config_gives_the_path(path, value):
    stored = dataclasses.asdict(tiny())
    *stage, name = path.split(".")
    (stored[stage[0]] if stage else stored)[name] = value
    assert message(from_mapping, stored).startswith(f"model.{path}={value!r}: ")


@pytest.mark.parametrize("path", ["widht", "global_model.dims", "local_model.rope_"])
def test_an_unknown_key_is_named_with_those_that_exist(path):
    stored = dataclasses.asdict(tiny())
    *stage, name = path.split(".")
    (stored[stage[0]] if stage else stored)[name] = 1
    text = message(from_mapping, stored)
    assert text.startswith(f"model.{path}: unknown")
    assert ("num_heads" if stage else "patch_size") in text


@pytest.mark.parametrize("path", ["seq_len", "global_model.dim", "global_model", "local_model"])
def test_a_missing_key_is_named(path):
    stored = dataclasses.asdict(tiny())
    *stage, name = path.split(".")
    del (stored[stage[0]] if stage else stored)[name]
    text = message(from_mapping, stored)
    assert text.startswith("model") and name in text


@pytest.mark.parametrize("name, value", [("global_model", 5), ("conv_kernels", 3), ("init", None)])
def test_a_stored_value_of_the_wrong_type_is_named(name, value):
    text = message(from_mapping, {**dataclasses.asdict(tiny()), name: value})
    assert text.startswith(f"model.{name}")


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().seq_len = 40


def test_a_zero_means_the_usual_width():
    stack = TransformerConfig(**STACK)
    assert (stack.head_width, stack.kv_heads, stack.hidden_dim) == (8, 3, 96)
    assert TransformerConfig(**STACK, activation="swiglu").hidden_dim == 64
    assert TransformerConfig(**{**STACK, "dim": 27}, activation="swiglu").hidden_dim == 72
    odd = TransformerConfig(**STACK, head_dim=10, num_kv_heads=1, mlp_dim=7)
    assert (odd.head_width, odd.kv_heads, odd.hidden_dim) == (10, 1, 7)


def test_the_default_of_cross_patch_is_the_whole_patch():
    assert [tiny(cross_patch=r).previous for r in (-1, 0, 3, 4)] == [4, 0, 3, 4]
    assert tiny().previous == 4
