"""Sets written by hand are found by name and read, slice by slice."""

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data import tfds_sets
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import DataError, UserError
from tests.tfds_files import (
    SHARD,
    TEST,
    TEXT,
    TRAIN,
    WRITERS,
    example,
    features_dict,
    one_set,
    open_mine,
    read,
    texts,
    write_set,
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tfds:pg19", ("pg19", None, None)),
        ("tfds:downsampled_imagenet/64x64", ("downsampled_imagenet", "64x64", None)),
        ("tfds:wikipedia/20230601.en:1.0.0", ("wikipedia", "20230601.en", "1.0.0")),
        ("tfds:a:10.20.30", ("a", None, "10.20.30")),
    ],
)
def test_a_source_has_a_name_a_config_and_a_version(source: str, expected: tuple) -> None:
    assert tfds_sets.is_tfds(source) and tfds_sets.parse(source) == expected


@pytest.mark.parametrize(
    "rest",
    "|../x|/etc|a/..|a/../b|a/b/c|a:1|a:1.0|a:*.*.*|huggingface:x|a/b=1|A|é|a b|a\n|a/.hidden"
    "|a:１.0.0|a/b:1.0.0/..|gs://x|a,b".split("|"),
)
def test_any_other_source_is_refused(rest: str) -> None:
    with pytest.raises(UserError, match=r"^data.source='tfds:.*accepted is tfds:NAME"):
        tfds_sets.parse(f"tfds:{rest}")


@settings(max_examples=200)
@given(st.text())
def test_no_source_leads_out_of_the_data_directory(rest: str) -> None:
    try:
        parts = [part for part in tfds_sets.parse(f"tfds:{rest}") if part]
    except UserError:
        return
    assert not any("/" in part or part.startswith(".") for part in parts)


@pytest.mark.parametrize("file_format", WRITERS)
def test_every_example_is_read_in_order(tmp_path: Path, file_format: str) -> None:
    one_set(tmp_path, file_format)
    assert read(tmp_path) == [b"0", b"", b"2", b"3", b"4", b"5", b"6"]
    prepared = open_mine(tmp_path)
    assert prepared.name == "tfds:mine:1.2.3" and prepared.splits == {"train": 7, "test": 2}
    names = [name for name, _ in tfds_sets.records(prepared, "test", "", "bytes", BadRecords(0))]
    assert names == ["tfds:mine:1.2.3/test#0", "tfds:mine:1.2.3/test#1"]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("file_format", WRITERS)
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:-2]", TRAIN[:-2]),
        ("train[3:5]", TRAIN[3:5]),
        ("train[5:]", TRAIN[5:]),
        ("train[50%:]", TRAIN[4:]),
        ("test+train[6:]", TEST + TRAIN[6:]),
        ("train[:1] + test[1:]", TRAIN[:1] + TEST[1:]),
        ("all", TRAIN + TEST),
        ("train[7:]", []),
    ],
)
def test_slices_and_sums_of_splits(
    tmp_path: Path, file_format: str, split: str, expected: list
) -> None:
    one_set(tmp_path, file_format)
    assert read(tmp_path, split) == expected
    assert tfds_sets.count(open_mine(tmp_path), split) == len(expected)


@pytest.mark.parametrize("split", ["valid", "", "train[", "train[a:b]", "all[:1]", "train[1]", "+"])
def test_a_split_that_is_none_is_refused_with_those_there_are(tmp_path: Path, split: str) -> None:
    one_set(tmp_path)
    with pytest.raises(UserError, match=r"accepted are its splits \(train, test\)") as raised:
        read(tmp_path, split)
    assert "\n" not in str(raised.value)


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0", "1.2.3"):
        records = {"train": [texts(version.encode())]}
        write_set(tmp_path, records, features_dict(data=TEXT), f"mine/{version}")
    (tmp_path / "mine" / "incomplete.AB12CD_2.0.0").mkdir()
    assert read(tmp_path) == [b"1.10.0"]
    assert read(tmp_path, source="tfds:mine:1.9.0") == [b"1.9.0"]


def test_the_default_config_is_the_one_that_tfds_noted(tmp_path: Path) -> None:
    for config in ("big", "small"):
        records = {"train": [texts(config.encode())]}
        write_set(tmp_path, records, features_dict(data=TEXT), f"mine/{config}/1.0.0")
    (tmp_path / "mine/.config").mkdir()
    (tmp_path / "mine/.config/metadata.json").write_text('{"default_config_name": "small"}')
    assert read(tmp_path) == [b"small"]
    assert read(tmp_path, source="tfds:mine/big") == [b"big"]
    assert open_mine(tmp_path, "tfds:mine/big").name == "tfds:mine/big:1.0.0"


def test_the_environment_says_where_sets_lie(tmp_path: Path, monkeypatch) -> None:
    one_set(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert tfds_sets.open_set("tfds:mine", "").directory == tmp_path / "mine/1.2.3"
    with pytest.raises(UserError, match="gs://bucket.*accepted is a local directory"):
        tfds_sets.open_set("tfds:mine", "gs://bucket")


def test_the_fingerprint_changes_with_what_is_read_and_with_the_files(tmp_path: Path) -> None:
    directory = one_set(tmp_path)
    prepared = open_mine(tmp_path)
    first = tfds_sets.fingerprint(prepared, "train")
    assert first == json.loads(json.dumps(first)) == tfds_sets.fingerprint(prepared, "train")
    assert tfds_sets.fingerprint(prepared, "train[1:]") != first
    os.utime(directory / SHARD, ns=(1, 1))
    assert tfds_sets.fingerprint(prepared, "train") != first


@pytest.mark.parametrize("record", [b"", b"\xff\xff", example(other=b"x"), example(data=[1, 2])])
def test_a_record_that_is_no_such_example_is_bad(tmp_path: Path, record: bytes) -> None:
    write_set(tmp_path, {"train": [[record, *texts(b"x")]]}, features_dict(data=TEXT))
    with pytest.raises(
        DataError, match=r"^tfds:mine:1.2.3/train#0 .*mine-train.*damaged"
    ) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)
    assert read(tmp_path, bad=BadRecords(1)) == [b"x"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=9), st.data())
def test_any_slice_is_that_of_a_list(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("any")
    cut = data.draw(st.integers(0, len(contents)))
    shards = [texts(*contents[:cut]), texts(*contents[cut:])]
    write_set(root, {"train": shards, "test": [texts(b"t")]}, features_dict(data=TEXT))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    start, stop = min(start, len(contents)), min(stop, len(contents))
    assert read(root, f"train[{start}:{stop}]") == contents[start:stop]


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "provenance.json", "shard"])
@pytest.mark.parametrize("kind", ["link", "loop", "fifo", "folder"])
def test_what_is_no_file_of_the_set_is_not_read(tmp_path: Path, file: str, kind: str) -> None:
    directory = one_set(tmp_path)
    path = directory / SHARD if file == "shard" else directory / file
    if path.exists():
        path.rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("{}")
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        {"fifo": os.mkfifo, "folder": os.mkdir}[kind](path)
    with pytest.raises(DataError, match=f"{path.name}: .*accepted is a file of the data set"):
        read(tmp_path)


@pytest.mark.parametrize(
    "split",
    [
        {"name": "train", "filepathTemplate": "{SPLIT.__class__}"},
        {"name": "train", "filepathTemplate": "{SPLIT:>99999999999}"},
        {"name": "train", "filepathTemplate": "{0}"},
        {"name": "train", "filepathTemplate": 3},
        {"name": "../../x"},
        {"name": ""},
        {"name": None},
        {"name": "train", "shardLengths": ["-3"]},
        {"name": "train", "shardLengths": ["many"]},
        {"name": "train", "shardLengths": 3},
        {"name": "train", "shardLengths": [float("inf")]},
        {},
        "train",
    ],
)
def test_an_index_that_no_version_of_tfds_wrote_is_refused(tmp_path: Path, split: object) -> None:
    write_set(tmp_path, {}, features_dict(data=TEXT), info={"splits": [split]})
    with pytest.raises(DataError, match="dataset_info.json: unusable"):
        open_mine(tmp_path)


@pytest.mark.parametrize("template", ["../../../secret", "/etc/hosts", "a/../../../../secret"])
def test_a_shard_elsewhere_is_not_read(tmp_path: Path, template: str) -> None:
    (tmp_path / "secret").write_text("x")
    split = {"name": "train", "shardLengths": ["1"], "filepathTemplate": template}
    write_set(tmp_path / "root", {}, features_dict(data=TEXT), info={"splits": [split]})
    bad = BadRecords(1)
    try:
        assert read(tmp_path / "root", bad=bad) == [] and "No such file" in bad.first
    except DataError as error:
        assert "lies outside of" in str(error)


@pytest.mark.parametrize("config", ["..", "../..", "a/b", "", None, 3, ".x", "\n"])
def test_a_default_config_leads_nowhere_else(tmp_path: Path, config: object) -> None:
    (tmp_path / "mine/.config").mkdir(parents=True)
    content = json.dumps({"default_config_name": config})
    (tmp_path / "mine/.config/metadata.json").write_text(content)
    with pytest.raises(DataError, match="metadata.json: names the config"):
        open_mine(tmp_path)


def test_another_file_format_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, {}, features_dict(data=TEXT), info={"fileFormat": "riegeli"})
    with pytest.raises(DataError, match="format 'riegeli' where array_record or tfrecord"):
        open_mine(tmp_path)
