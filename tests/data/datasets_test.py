import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from megabyte_jax.data import builders, datasets, media
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import open_corpus
from megabyte_jax.data.splits import split_corpus
from megabyte_jax.errors import DataError, EmptySplitError, UserError
from tests import runs

H, W, P = 4, 6, 12
RATE = 8000


def image_config(source: Path, **changes):
    changes = {
        "data.modality": "image",
        "data.image.height": H,
        "data.image.width": W,
        "data.split.by": "name",
        "data.cache_dir": str(source.parent / "cache"),
        "data.max_bad_records": 0,
        **changes,
    }
    return runs.tiny_config(source, **changes).data


def audio_config(source: Path, **changes):
    changes = {"data.modality": "audio", "data.audio.sample_rate": RATE, **changes}
    return image_config(source, **changes)


@pytest.fixture
def photos(tmp_path):
    """Six images of train, three of valid and test, as uint8 [H, W, 3] by path."""
    arrays = {}
    for i in range(12):
        folder = ("train", "valid", "train", "test")[i % 4]
        path = tmp_path / "photos" / folder / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays[path] = np.random.default_rng(i).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(arrays[path]).save(path)
    return arrays


def scanned(pixels: np.ndarray, p: int) -> bytes:
    return b"".join(
        pixels[y + i, x + j].tobytes()
        for y in range(0, H, p)
        for x in range(0, W, p)
        for i in range(p)
        for j in range(p)
    )


def root_of(arrays) -> Path:
    return next(iter(arrays)).parents[1]


@pytest.mark.parametrize("scan, p", [("patch", 2), ("raster", 1)])
def test_a_folder_of_images_is_its_pixels_in_the_order_of_the_scan(photos, scan, p):
    data = image_config(root_of(photos), **{"data.image.scan": scan})
    parts = datasets.open_splits(data, ("train", "valid", "test"), P)
    for part, folder in zip(parts, ("train", "valid", "test"), strict=True):
        expected = [scanned(pixels, p) for path, pixels in photos.items() if folder in path.parts]
        assert [document.data.tobytes() for document in part] == expected
        assert part.name == str(root_of(photos))


def test_images_of_other_sizes_are_cropped_and_resized_when_asked(photos):
    shapes = [(20, 40), (10, 19), (30, 15)]
    centres = [(5, 0, 35, 20), (2, 0, 17, 10), (0, 10, 15, 20)]  # left, top, right, bottom
    fitted = {}
    for i, path in enumerate(photos):
        pixels = np.random.default_rng(i).integers(0, 256, (*shapes[i % 3], 3), np.uint8)
        image = Image.fromarray(pixels)
        image.save(path)
        fitted[path] = image.crop(centres[i % 3]).resize((W, H), Image.Resampling.BOX)
    data = image_config(root_of(photos), **{"data.image.resize": "box"})
    (train,) = datasets.open_splits(data, ("train",), P)
    for document, path in zip(train, [p for p in photos if "train" in p.parts], strict=True):
        assert document.data.tobytes() == scanned(np.asarray(fitted[path]), 2)
    with pytest.raises(DataError, match=r"\.png: has 20 x 40 pixels .*data.image.height.* = 4 x 6"):
        datasets.open_splits(image_config(root_of(photos)), ("train",), P)


def test_a_folder_of_sound_is_its_samples(tmp_path):
    written = {}
    for i, folder in enumerate(("train", "valid", "train")):
        path = tmp_path / "sound" / folder / f"{i}.{'flac' if i else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        written[path] = np.random.default_rng(i).integers(-9999, 9999, 50 + i, np.int16)
        soundfile.write(path, written[path], RATE)
    train, valid = datasets.open_splits(audio_config(tmp_path / "sound"), ("train", "valid"), P)
    assert [document.data.tobytes() for document in (*train, *valid)] == [
        written[path].astype("<i2").tobytes() for path in sorted(written)
    ]


def test_files_are_decoded_once_and_again_when_they_change(photos, monkeypatch):
    data = image_config(root_of(photos))
    datasets.open_splits(data, ("valid",), P)
    decoded = []
    original = media.from_file

    def counted(contents, name, *rest):
        decoded.append(name)
        return original(contents, name, *rest)

    monkeypatch.setattr(media, "from_file", counted)
    (before,) = datasets.open_splits(data, ("valid",), P)
    assert decoded == []
    path = next(path for path in photos if "valid" in path.parts)
    Image.fromarray(255 - photos[path]).save(path)
    os.utime(path, ns=(1, 1))
    (after,) = datasets.open_splits(data, ("valid",), P)
    assert str(path) in decoded and len(decoded) == 3
    assert (after.documents[0].data == 255 - before.documents[0].data).all()
    data.image.scan = "raster"
    datasets.open_splits(data, ("valid",), P)
    assert len(decoded) == 6


def test_other_files_of_the_same_sizes_and_times_are_not_taken_for_them(tmp_path):
    cache = {"data.cache_dir": str(tmp_path / "cache")}
    samples = {}
    for name, value in {"a/b": 1, "a-b": 2}.items():
        (tmp_path / name / "train").mkdir(parents=True)
        path = tmp_path / name / "train" / "x.wav"
        soundfile.write(path, np.full(50, value, np.int16), RATE)
        os.utime(path, ns=(1, 1))
        (train,) = datasets.open_splits(audio_config(tmp_path / name, **cache), ("train",), P)
        samples[name] = {*train.documents[0].data.view("<i2").tolist()}
    assert samples == {"a/b": {1}, "a-b": {2}}
    shutil.copy2(tmp_path / "a-b" / "train" / "x.wav", tmp_path / "a" / "b" / "train" / "x.wav")
    (train,) = datasets.open_splits(audio_config(tmp_path / "a/b", **cache), ("train",), P)
    assert {*train.documents[0].data.view("<i2").tolist()} == {2}


def test_a_relative_path_finds_what_was_decoded_under_the_whole_one(photos, monkeypatch):
    data = image_config(root_of(photos))
    datasets.open_splits(data, ("train",), P)
    entries = os.listdir(data.cache_dir)
    monkeypatch.chdir(root_of(photos).parent)
    data.source = "photos"
    datasets.open_splits(data, ("train",), P)
    assert os.listdir(data.cache_dir) == entries


BAD = {
    "text.png": b"this is text",
    "notes.txt": b"this is text",
    "empty.png": b"",
    "sound.wav": b"RIFF....WAVE",
}


@pytest.mark.parametrize("name", [*BAD, "cut.png", "loop.png"])
def test_what_is_no_image_is_named_and_counted(photos, name, capsys):
    path = root_of(photos) / "train" / name
    good = next(iter(photos)).read_bytes()
    if name == "loop.png":
        path.symlink_to(path)
    else:
        path.write_bytes(BAD.get(name, good[:-30]))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*max_bad_records=0") as raised:
        datasets.open_splits(image_config(root_of(photos)), ("train",), P)
    assert "\n" not in str(raised.value) and raised.value.exit_status == 3
    tolerant = image_config(root_of(photos), **{"data.max_bad_records": 1})
    for _ in range(2):  # decoded, then from the cache
        (train,) = datasets.open_splits(tolerant, ("train",), P)
        assert len(train) == 6
        assert f"left out 1 bad records, the first: {path}: " in capsys.readouterr().err


def test_the_tolerance_holds_for_what_the_cache_left_out(photos):
    (root_of(photos) / "train" / "x.png").write_bytes(b"no")
    datasets.open_splits(
        image_config(root_of(photos), **{"data.max_bad_records": 1}), ("train",), P
    )
    with pytest.raises(DataError, match="x.png: .*max_bad_records=0"):
        datasets.open_splits(image_config(root_of(photos)), ("train",), P)


def test_all_of_another_source_is_decoded_as_the_config_says(photos):
    data = image_config(root_of(photos))
    corpus = datasets.open_all(str(root_of(photos)), data, P, "--data")
    assert sorted(document.data.tobytes() for document in corpus) == sorted(
        scanned(pixels, 2) for pixels in photos.values()
    )
    with pytest.raises(UserError, match="^--data='missing': "):
        datasets.open_all("missing", data, P, "--data")


def test_files_of_bytes_are_read_where_they_are(text_dir, tmp_path):
    data = runs.tiny_config(text_dir, **{"data.cache_dir": str(tmp_path / "cache")}).data
    parts = datasets.open_splits(data, ("train", "valid", "test"), P)
    names = [document.name for part in parts for document in part]
    assert sorted(names) == sorted(path.name for path in text_dir.iterdir() if path.stat().st_size)
    assert not (tmp_path / "cache").exists()


def test_a_tfds_source_has_splits_of_its_own():
    data = runs.tiny_config("tfds:pg19").data
    with pytest.raises(UserError, match="^data.split.by='document': accepted is name for a TFDS"):
        datasets.open_splits(data, ("train",), P)


def prepared_config(photos, tmp_path, **changes):
    """The config of a run on a TFDS set of the photos, as PNG files of another size."""
    source = image_config(root_of(photos), **{"data.tfds.data_dir": str(tmp_path / "sets")})
    whole = open_corpus(str(root_of(photos)))
    parts = {name: split_corpus(whole, name, **source.split) for name in ("train", "test")}
    builders.prepare("mine", source, parts, source.tfds.data_dir, BadRecords(0))
    source.source = "tfds:image_files/mine"
    source.update_from_flattened_dict({key.removeprefix("data."): v for key, v in changes.items()})
    return source


def test_a_tfds_set_is_its_records_in_the_order_of_the_scan(photos, tmp_path):
    # The name of the feature is that of a set in the catalogue; one of ours has `data`.
    data = prepared_config(photos, tmp_path, **{"data.tfds.feature": "image"})
    for split in ("train", "test"):
        (part,) = datasets.open_splits(data, (split,), P)
        expected = [scanned(pixels, 2) for path, pixels in photos.items() if split in path.parts]
        assert [document.data.tobytes() for document in part] == expected
    assert datasets.open_all(data.source, data, P, "--data").num_bytes == 9 * H * W * 3


@pytest.mark.parametrize("name", ["train[:0]", "train[50%:10%]", "valid", "nothing"])
def test_a_tfds_split_without_a_record_is_a_mistake_that_is_named(photos, tmp_path, name):
    data = prepared_config(photos, tmp_path, **{"data.split.valid": name})
    with pytest.raises(EmptySplitError, match=f"^data.split.*{re.escape(repr(name))}.*accepted"):
        datasets.open_splits(data, ("valid",), P)
