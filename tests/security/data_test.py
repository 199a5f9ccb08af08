"""Data from elsewhere import nothing, and take the memory and the disk of what they are: S3."""

import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest

from megabyte_jax.data import audio, flat, images
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import DataError
from tests import runs
from tests.security import hostile
from tests.tfds_files import HOSTILE, TEXT, features_dict, texts, write_set


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def results(place):
    """How the sets end whose features.json names a class that lies where Python would find it."""
    (place / "cwd").mkdir()
    hostile.plant(place / "cwd", place / hostile.MARK)
    sets = [("clean", features_dict(data=TEXT)), *HOSTILE.items()]
    jobs = []
    for number, (_, features) in enumerate(sets):
        write_set(place / str(number), {"train": [texts(b"x")]}, features)
        jobs.append(("tfds", place / str(number)))
    clean, *found = hostile.attempt(jobs, place, place, cwd=place / "cwd")
    assert clean["ended"] == "1"
    return dict(zip(HOSTILE, found, strict=True))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_set_that_names_a_class_imports_nothing(results, place, case):
    found = results[case]
    assert found["ended"].startswith("DataError: ") and "names the class" in found["ended"]
    assert found["events"] == [] and not (place / hostile.MARK).exists()
    assert found["seconds"] < 10 and found["grown"] < 2**27


def write_layout(root: Path) -> Path:
    corpus = flat.flatten(str(root), "x", {"k": 1}, [b"abc", b"defg"], BadRecords(0))
    return Path(corpus.documents.source).parent


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([0.0, 3, 7]),
        np.array([0, 3, 7], np.int32),
        np.array([[0], [3], [7]]),
        np.array([0, 9, 7]),
        np.array([-4, 3, 7]),
        np.array([1, 3, 7]),
        np.array([0, 2**62, 7]),
        np.array([0, 3, 7], object),
        np.array([0, 3, 7], "datetime64[s]"),
    ],
    ids=str,
)
def test_a_planted_cache_is_held_to_what_a_cache_is(tmp_path, offsets):
    directory = write_layout(tmp_path)
    np.save(directory / "offsets.npy", offsets, allow_pickle=True)
    digest = hashlib.sha256((directory / "offsets.npy").read_bytes()).hexdigest()
    hostile.edit(directory / "manifest.json", **{"sha256__offsets.npy": digest})
    with pytest.raises(DataError, match="damaged"):
        write_layout(tmp_path)


@pytest.mark.parametrize("file", ["manifest.json", "offsets.npy", "data.bin"])
@pytest.mark.parametrize("kind", ["link", "fifo", "sparse"])
def test_a_cache_of_links_and_fifos_is_not_read(tmp_path, file, kind):
    path = write_layout(tmp_path / "cache") / file
    if kind == "sparse":
        os.truncate(path, 2**40)
    else:
        path.rename(tmp_path / file)
    if kind == "link":
        path.symlink_to(tmp_path / file)
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(DataError, match="damaged"):
        write_layout(tmp_path / "cache")


def test_the_cache_is_the_users_alone(tmp_path):
    write_layout(tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    assert len(file.getvalue()) < 2**18
    with pytest.raises(DataError, match="^x: .*decompression bomb.*; accepted is a smaller image"):
        images.decode(file.getvalue(), "x", 8, 8, "box")


def test_silence_is_refused_before_it_is_decoded():
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(2**24 + 2**22, np.int16), 16_000, "PCM_16", format="FLAC")
    assert len(file.getvalue()) < 2**17
    with pytest.raises(DataError, match="^x: promises 20,971,520 samples"):
        audio.decode(file.getvalue(), "x", 16_000)


def test_a_report_stays_in_the_work_directory_whatever_the_data_are_called(
    tmp_path, finished_run, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = hostile.copy_of(finished_run, tmp_path / "run")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "$(touch ran);\n\x1b[2J..").write_bytes(b"abc")
    before = runs.contents(tmp_path)
    assert runs.run_main("eval", f"--workdir={run}", "--data=a/../a/$(touch ran);\n\x1b[2J..") == 0
    made = {Path(name) for name in runs.contents(tmp_path).keys() - before}
    assert {path.parent for path in made} == {Path("run"), Path("run/eval")} and len(made) == 3
    assert all(re.fullmatch(r"eval|[\w-]+\.(json|png)", path.name) for path in made)
