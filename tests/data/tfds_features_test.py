"""What a set says of itself, and sets from elsewhere: nothing in one is imported or run."""

import contextlib
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data import tfds_sets
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import DataError, UserError
from tests.tfds_files import (
    CORE,
    HOSTILE,
    IMAGE,
    SPEECH,
    TEXT,
    evil,
    example,
    feature,
    features_dict,
    one_set,
    open_mine,
    read,
    tensor,
    texts,
    write_set,
)


def test_images_are_handed_on_as_the_files_they_were(tmp_path: Path) -> None:
    records = {"train": [[example(image=b"\x89PNG...", label=[3])]]}
    label = feature("class_label_feature.ClassLabel", "classLabel", numClasses="9")
    write_set(tmp_path, records, features_dict(image=IMAGE, label=label))
    assert read(tmp_path, modality="image") == [b"\x89PNG..."]


def test_sound_is_read_without_its_class_and_with_its_rate(tmp_path: Path) -> None:
    samples = np.array([-32768, 0, 7, 32767])
    records = {"train": [[example(speech=samples.tolist(), text=b"hello")]]}
    write_set(tmp_path, records, features_dict(speech=SPEECH, text=TEXT))
    (array,) = read(tmp_path, modality="audio")
    assert array.shape == (4,) and (array == samples).all()
    assert tfds_sets.sample_rate(open_mine(tmp_path), "", "audio") == 8000


@pytest.mark.parametrize("encoding", ["none", "bytes", "zlib"])
def test_arrays_are_read_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    stored = {"none": array.ravel().tolist(), "bytes": array.tobytes()}
    stored["zlib"] = zlib.compress(array.tobytes())
    records = {"train": [[example(x=stored[encoding])]]}
    write_set(tmp_path, records, features_dict(x=tensor("uint8", 2, -1, 3, encoding=encoding)))
    (found,) = read(tmp_path, modality="image")
    assert found.dtype == np.uint8 and found.shape == (2, 4, 3) and (found == array).all()


def test_features_in_the_form_of_older_versions_are_read(tmp_path: Path) -> None:
    legacy = {
        "type": CORE + "features_dict.FeaturesDict",
        "content": {
            "book": {"type": CORE + "text_feature.Text", "content": {"use_encoder": False}},
            "wave": {
                "type": CORE + "feature.Tensor",
                "content": '{"shape": {"dimensions": ["-1"]}, "dtype": "int16"}',
                "proto_cls": "tensorflow_datasets.TensorFeature",
            },
            "type": {"type": CORE + "class_label_feature.ClassLabel", "content": {}},
        },
    }
    records = {"train": [[example(book=b"text", wave=[1, -2])]]}
    write_set(tmp_path, records, legacy)
    assert read(tmp_path) == [b"text"]
    assert read(tmp_path, modality="audio")[0].tolist() == [1, -2]


def test_the_feature_called_data_goes_first(tmp_path: Path) -> None:
    records = {"train": [[example(data=b"1", title=b"2")]]}
    write_set(tmp_path, records, features_dict(data=TEXT, title=TEXT))
    assert read(tmp_path) == [b"1"] and read(tmp_path, feature="title") == [b"2"]


@pytest.mark.parametrize(
    ("name", "modality", "accepted"),
    [
        ("", "bytes", "one of text, title"),
        ("speech", "bytes", "one of text, title"),
        ("text", "audio", "one of speech"),
        ("", "image", r"another data.modality than image.*speech \(Audio\)"),
    ],
)
def test_a_feature_that_is_not_clear_is_refused_with_the_candidates(
    tmp_path: Path, name: str, modality: str, accepted: str
) -> None:
    write_set(tmp_path, {"train": []}, features_dict(text=TEXT, title=TEXT, speech=SPEECH))
    with pytest.raises(UserError, match=f"^data.tfds.feature='{name}'.*{accepted}"):
        read(tmp_path, feature=name, modality=modality)


# What a set from elsewhere may hold. Nothing in it may be imported or run.


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported, where an import would find it."""
    mark = tmp_path / "imported"
    folder = tmp_path / "cwd" / "planted"
    folder.mkdir(parents=True)
    code = f"open({str(mark)!r}, 'w').close()\nclass Text: pass\nFeature = Builder = Text\n"
    (folder / "__init__.py").write_text(code)
    (folder / "text_feature.py").write_text(code)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(str(tmp_path / "cwd"))
    return mark


@pytest.mark.parametrize("case", HOSTILE)
def test_a_class_that_is_not_tfds_own_is_refused_by_name(
    tmp_path: Path, planted: Path, case: str
) -> None:
    modules = set(sys.modules)
    write_set(tmp_path, {"train": [texts(b"x")]}, HOSTILE[case])
    with pytest.raises(DataError, match="features.json: names the class") as raised:
        read(tmp_path)
    assert not planted.exists() and set(sys.modules) == modules
    assert "\n" not in str(raised.value)


def test_tfds_itself_would_have_imported_it(tmp_path: Path, planted: Path) -> None:
    directory = write_set(tmp_path, {"train": [texts(b"x")]}, HOSTILE["a feature"])
    with pytest.raises(ValueError, match="planted"):
        tfds.builder_from_directory(str(directory))
    assert planted.exists()
    sys.modules.pop("planted")


@pytest.mark.parametrize("value", ["planted", "planted.text_feature", "os"])
def test_the_module_of_a_builder_is_not_imported(tmp_path: Path, planted: Path, value: str) -> None:
    hostile = {"moduleName": value, "features": evil()}
    records = {"train": [texts(b"x")]}
    write_set(tmp_path, records, features_dict(data=TEXT), info=hostile)
    assert read(tmp_path) == [b"x"] and not planted.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\0", "\xff", "{}"])
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_files_that_are_no_such_json_are_named(tmp_path: Path, file: str, text: str) -> None:
    directory = one_set(tmp_path)
    (directory / file).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=f"{file}: (unusable|damaged)") as raised:
        open_mine(tmp_path)
    assert "\n" not in str(raised.value)


def test_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    directory = one_set(tmp_path)
    (directory / "features.json").write_text('{"a":' * 900 + "1" + "}" * 900)
    with pytest.raises(DataError, match="features.json: (unusable|damaged)"):
        open_mine(tmp_path)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_huge_file_is_not_read(tmp_path: Path, file: str) -> None:
    directory = one_set(tmp_path)
    os.truncate(directory / file, 1 << 40)
    with pytest.raises(DataError, match=f"{file}: unusable .1099511627776 bytes"):
        open_mine(tmp_path)


def mutate(value: object, path: list[int], leaf: object) -> object:
    """Puts `leaf` where the numbers of `path` lead to in nested JSON."""
    if not (path and value and isinstance(value, dict | list)):
        return leaf
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[path[0] % len(keys)]
    value[key] = mutate(value[key], path[1:], leaf)
    return value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["features.json", "dataset_info.json", "provenance.json"]),
    st.lists(st.integers(0, 9), max_size=7),
    JSON,
)
def test_any_change_of_the_json_is_an_error_of_ours_or_none(
    tmp_path_factory: pytest.TempPathFactory, file: str, path: list[int], leaf: object
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    features = features_dict(data=TEXT, x=tensor("uint8", 2, -1, 3), speech=SPEECH)
    directory = write_set(root, {"train": [texts(b"x")]}, features)
    shard = {"mine-train.tfrecord-00000-of-00001": {"bytes": 1, "sha256": "0"}}
    split = {"train": {"sha256": "0", "shards": shard}}
    noted = {"data": {"audio": {"sample_rate": 1}}, "splits": split}
    (directory / "provenance.json").write_text(json.dumps(noted))
    changed = mutate(json.loads((directory / file).read_text()), path, leaf)
    (directory / file).write_text(json.dumps(changed))
    for modality in ("bytes", "image", "audio"):
        with contextlib.suppress(DataError, UserError):
            read(root, modality=modality, bad=BadRecords(9))
