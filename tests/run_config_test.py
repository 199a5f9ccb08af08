import json
import re

import pytest
from ml_collections import ConfigDict

from configs import base
from megabyte_jax import run_config
from megabyte_jax.data.corpus import Corpus, open_corpus
from megabyte_jax.errors import UserError
from tests import runs


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


def test_a_config_comes_back_from_its_work_directory_as_it_was(tmp_path):
    config = runs.tiny_config("stdlib", **{"model.conv_kernels": (3, 5)})
    assert run_config.open_workdir(str(tmp_path / "a/b"), config, {}) == tmp_path / "a/b"
    loaded = run_config.load(tmp_path / "a/b")
    assert loaded.to_dict() == runs.as_json(config)
    assert run_config.validate(loaded) == run_config.validate(config)
    run_config.open_workdir(str(tmp_path / "a/b"), config, {})
    assert list(runs.contents(tmp_path / "a/b")) == ["config.json", "data.json"]


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
