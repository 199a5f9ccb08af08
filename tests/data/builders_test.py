"""Sets are prepared for real from files, without TensorFlow, and read back."""

import hashlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from megabyte_jax.data import audio, builders, tfds_sets
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus, Document, open_corpus
from megabyte_jax.errors import DataError, UserError

TREE = {"a/1.txt": b"one", "a/2.py": b"\0\xff" * 400, "b/é \n.txt": b"x", "c": b"last" * 9}


def settings_of(modality: str, source: object = ""):
    data = base.get_config().data
    data.update(modality=modality, source=str(source))
    data.image.update(height=4, width=6)
    return data


def corpus_of(*contents: bytes) -> Corpus:
    arrays = [np.frombuffer(content, np.uint8) for content in contents]
    documents = [Document(f"{i}", array, 0, len(array)) for i, array in enumerate(arrays)]
    return Corpus("test", documents)


def tree(root: Path, files: dict[str, bytes]) -> Corpus:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return open_corpus(str(root))


def prepare(root: Path, modality: str = "bytes", limit: int = 0, **splits: Corpus) -> Path:
    data = settings_of(modality, "where it came from")
    return builders.prepare("mine", data, splits, str(root), BadRecords(limit))


def read(root: Path, split: str = "train", modality: str = "bytes", limit: int = 0) -> list:
    names = {"bytes": "byte_files", "image": "image_files", "audio": "audio_files"}
    prepared = tfds_sets.open_set(f"tfds:{names[modality]}/mine", str(root))
    return [one for _, one in tfds_sets.records(prepared, split, "", modality, BadRecords(limit))]


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def nothing_in(root: Path) -> bool:
    return not [path for path in root.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with shards of two splits, to be copied by whoever damages it."""
    root = tmp_path_factory.mktemp("own")
    contents = [bytes([i]) * (i * 37 + 1) for i in range(40)]
    prepare(root, train=corpus_of(*contents), test=corpus_of(b"one"))
    return root / "byte_files" / "mine" / "1.0.0"


@pytest.fixture
def copy(own: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "byte_files" / "mine" / "1.0.0"
    directory.mkdir(parents=True)
    for path in own.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def shard_of(directory: Path) -> Path:
    return next(directory.glob("*train*"))


def test_a_tree_of_files_comes_back_byte_for_byte_in_its_order(tmp_path: Path) -> None:
    corpus = tree(tmp_path / "source", TREE)
    prepare(tmp_path / "sets", train=corpus, validation=corpus_of(b"v"))
    assert read(tmp_path / "sets") == [TREE[document.name] for document in corpus]
    assert read(tmp_path / "sets", "validation") == [b"v"]
    assert "tensorflow" not in sys.modules


def test_a_name_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"not \xff utf-8")
    prepare(tmp_path / "sets", train=tree(tmp_path / "source", {name: b"1", "b": b"2"}))
    prepared = tfds_sets.open_set("tfds:byte_files/mine", str(tmp_path / "sets"))
    names = tfds_sets.records(prepared, "train", "name", "bytes", BadRecords(0))
    assert [one for _, one in names] == [b"b", b"not \xff utf-8"]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12))
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, contents: list) -> None:
    root = tmp_path_factory.mktemp("any")
    prepare(root, train=corpus_of(*contents))
    assert read(root) == contents


def test_images_come_back_pixel_for_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    jpeg = png(pixels[2], "JPEG")
    prepare(tmp_path, "image", train=corpus_of(png(pixels[0]), png(pixels[1]), jpeg))
    first, second, third = read(tmp_path, modality="image")
    assert (first == pixels[0]).all() and (second == pixels[1]).all()
    assert (third == np.asarray(Image.open(io.BytesIO(jpeg)))).all()


def test_sound_comes_back_sample_for_sample_with_its_rate(tmp_path: Path) -> None:
    samples = np.array([0, -32768, 32767, 5], np.int16)
    wave = audio.encode(samples.tobytes(), 16_000)
    prepare(tmp_path, "audio", train=corpus_of(wave))
    (array,) = read(tmp_path, modality="audio")
    assert array.dtype == np.int16 and (array == samples).all()
    prepared = tfds_sets.open_set("tfds:audio_files/mine", str(tmp_path))
    assert tfds_sets.sample_rate(prepared, "", "audio") == 16_000


def test_tfds_reads_the_set_too(own: Path) -> None:
    builder = tfds.builder_from_directory(str(own))
    assert [one["data"] for one in builder.as_data_source("test")] == [b"one"]


def test_provenance_says_what_was_made_of_what(own: Path) -> None:
    noted = json.loads((own / "provenance.json").read_text())
    train, shard = noted["splits"]["train"], shard_of(own)
    digest = hashlib.sha256()
    for i in range(40):
        digest.update((i * 37 + 1).to_bytes(8, "little") + bytes([i]) * (i * 37 + 1))
    assert noted["source"] == "where it came from" and noted["data"]["modality"] == "bytes"
    assert train["documents"] == 40 and train["bytes"] == sum(i * 37 + 1 for i in range(40))
    assert train["sha256"] == digest.hexdigest()
    checksum = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert train["shards"][shard.name] == {"bytes": shard.stat().st_size, "sha256": checksum}


def test_the_same_documents_make_the_same_shards(own: Path, tmp_path: Path) -> None:
    contents = [bytes([i]) * (i * 37 + 1) for i in range(40)]
    again = prepare(tmp_path, train=corpus_of(*contents), test=corpus_of(b"one"))
    assert shard_of(again).read_bytes() == shard_of(own).read_bytes()


def test_an_empty_split_is_left_out(tmp_path: Path) -> None:
    prepare(tmp_path, train=corpus_of(b"a"), test=corpus_of())
    assert tfds_sets.open_set("tfds:byte_files/mine", str(tmp_path)).splits == {"train": 1}


def test_a_set_that_is_there_is_not_written_over(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(UserError, match="mine/1.0.0: is there already"):
        prepare(copy.parents[2], train=corpus_of(b"other"))
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a:1.0.0", "../../x", "é", "a b", "-x"])
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="accepted is"):
        data = settings_of("bytes")
        builders.prepare(name, data, {"train": corpus_of(b"a")}, str(tmp_path), BadRecords(0))
    assert nothing_in(tmp_path)


def test_damaged_files_are_left_out_up_to_the_limit(tmp_path: Path) -> None:
    good = png(np.zeros((4, 6, 3), np.uint8))
    prepare(tmp_path, "image", limit=2, train=corpus_of(b"text", good, good[:40]))
    assert len(read(tmp_path, modality="image")) == 1


def test_too_many_damaged_files_stop_it_and_leave_nothing(tmp_path: Path) -> None:
    good = png(np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(DataError, match="^1: .*data.max_bad_records=0"):
        prepare(tmp_path, "image", train=corpus_of(good, b"text"))
    assert nothing_in(tmp_path)


def test_a_split_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document is left of 2: 0: "):
        prepare(tmp_path, limit=9, train=corpus_of(b"", b""))
    assert nothing_in(tmp_path)


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(builders, "_checksum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path, train=corpus_of(b"a"))
    assert nothing_in(tmp_path)
    with pytest.raises(DataError, match="byte_files/mine.*not found"):
        read(tmp_path)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to finalize writing:\nNo space left on device")

    monkeypatch.setattr("tensorflow_datasets.core.writer.Writer.finalize", full)
    with pytest.raises(UserError, match="data_dir=.*: .*writing: No space left on device; acc"):
        prepare(tmp_path, train=corpus_of(b"1"))
    assert nothing_in(tmp_path)


def test_a_directory_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="data.tfds.data_dir"):
        prepare(tmp_path / "file", train=corpus_of(b"a"))


def test_a_shard_cut_short_is_named(copy: Path) -> None:
    os.truncate(shard_of(copy), 70_000)
    with pytest.raises(DataError, match=f"{shard_of(copy).name}: has 70000 bytes"):
        read(copy.parents[2], limit=99)


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard_of(copy).unlink()
    with pytest.raises(DataError, match="byte_files-train.* No such file"):
        read(copy.parents[2], limit=99)


def test_a_shard_of_other_contents_is_noticed_at_its_end(copy: Path, tmp_path: Path) -> None:
    contents = [bytes([i + (i == 7)]) * (i * 37 + 1) for i in range(40)]
    other = prepare(tmp_path / "other", train=corpus_of(*contents))
    shard_of(copy).write_bytes(shard_of(other).read_bytes())
    with pytest.raises(DataError, match="the split train has another SHA-256"):
        read(copy.parents[2])


def test_flipped_bits_are_noticed_wherever_they_are(copy: Path) -> None:
    shard, whole = shard_of(copy), shard_of(copy).read_bytes()
    expected = [bytes([i]) * (i * 37 + 1) for i in range(40)]
    used = len(whole.rstrip(b"\0")) // 2
    for at in np.random.default_rng(1).integers(0, used, 40).tolist():
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        try:
            assert read(copy.parents[2]) == expected  # the bit was padding
        except DataError as error:
            assert shard.name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"data": 1, "splits": 2}'])
def test_damaged_provenance_is_named(copy: Path, damage: str) -> None:
    (copy / "provenance.json").write_text(damage)
    with pytest.raises(DataError, match="provenance.json: unusable"):
        read(copy.parents[2])


@pytest.mark.parametrize(
    ("builder", "names"),
    [
        (builders.ByteFiles, ["pg19", "stories", "books", "arxiv", "code"]),
        (builders.ImageFiles, ["imagenet64", "imagenet256", "imagenet640"]),
        (builders.AudioFiles, ["audio"]),
    ],
)
def test_the_tasks_of_the_paper_have_builders(builder, names: list[str], tmp_path: Path) -> None:
    assert [config.name for config in builder.BUILDER_CONFIGS] == names
    for config in builder.BUILDER_CONFIGS:
        assert config.description
        made = builder(config=config.name, data_dir=str(tmp_path))
        assert set(made.info.features) == {"name", "data"}
