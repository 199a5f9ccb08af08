import io
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from megabyte_jax.data import media
from megabyte_jax.errors import DataError


def config(modality, scan="raster"):
    data = base.get_config().data
    data.update(modality=modality)
    data.image.update(height=4, width=6, scan=scan)
    return data


@given(st.binary(max_size=99))
def test_bytes_are_the_file(contents):
    assert media.encode(contents, config("bytes"), 8) == contents


@given(st.binary(max_size=100))
def test_an_image_is_whole_and_what_is_missing_is_black(contents):
    file = media.encode(contents, config("image"), 8)
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    assert pixels.shape == (4, 6, 3)
    assert pixels.tobytes() == contents[:72] + bytes(72 - len(contents[:72]))


def test_patches_go_to_their_places():
    file = media.encode(bytes(range(12)), config("image", "patch"), 12)
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    assert pixels[:2, :2].tobytes() == bytes(range(12)) and not pixels[:, 2:].any()


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_sound_has_whole_samples(size):
    file = media.encode(bytes(range(size)), config("audio"), 8)
    with wave.open(io.BytesIO(file)) as sound:
        assert sound.readframes(9) == bytes(range(size // 2 * 2))


def test_the_unit_is_an_image_or_a_sample():
    assert [media.unit(config(m)) for m in ("bytes", "image", "audio")] == [1, 72, 2]


@given(st.binary(min_size=1, max_size=99))
def test_of_modality_bytes_a_file_is_what_is_read(contents):
    assert media.from_file(contents, "x", config("bytes"), 8) == contents
    array = np.frombuffer(contents, np.uint8)
    assert media.from_array(array, "x", config("bytes"), 8) == contents
    assert media.from_array(array[::-1, None], "x", config("bytes"), 8) == contents[::-1]


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=72, max_size=72), st.sampled_from(["raster", "patch"]))
def test_what_is_read_of_a_written_image_is_the_same_bytes(contents, scan):
    data = config("image", scan)
    file = media.encode(contents, data, 12)
    assert media.from_file(file, "x", data, 12) == contents
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    assert media.from_array(pixels, "x", data, 12) == contents


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50).flatmap(lambda n: st.binary(min_size=2 * n, max_size=2 * n)))
def test_what_is_read_of_a_written_sound_is_the_same_bytes(contents):
    data = config("audio")
    assert media.from_file(media.encode(contents, data, 8), "x", data, 8) == contents
    samples = np.frombuffer(contents, "<i2")
    assert media.from_array(samples.astype(np.int64), "x", data, 8) == contents
    file = io.BytesIO()
    soundfile.write(file, samples, data.audio.sample_rate, format="FLAC")
    assert media.from_file(file.getvalue(), "x", data, 8) == contents


def test_an_image_of_another_size_is_resized_where_the_config_names_a_filter():
    data = config("image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    with pytest.raises(DataError, match="^x: has 8 x 12 pixels .* = 4 x 6$"):
        media.from_array(pixels, "x", data, 8)
    data.image.resize = "bicubic"
    expected = Image.fromarray(pixels).resize((6, 4), Image.Resampling.BICUBIC).tobytes()
    assert media.from_array(pixels, "x", data, 8) == expected
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert media.from_file(file.getvalue(), "x", data, 8) == expected


def test_an_array_of_sound_has_the_rate_of_the_config_unless_it_is_said():
    data = config("audio")
    samples = np.full(4000, 1000, np.int16)
    assert media.from_array(samples, "x", data, 8) == samples.tobytes()
    made = np.frombuffer(media.from_array(samples, "x", data, 8, rate=8000), "<i2")
    assert len(made) == 8000 and set(made[1000:-1000]) == {1000}


@pytest.mark.parametrize("modality", ["bytes", "image", "audio"])
def test_a_record_without_a_byte_is_refused(modality):
    with pytest.raises(DataError, match="^train/7: holds no byte; accepted is"):
        media.from_file(b"", "train/7", config(modality), 8)
    with pytest.raises(DataError, match="^train/7: holds no byte; accepted is"):
        media.from_array(np.zeros(0, np.uint8), "train/7", config(modality), 8)


@pytest.mark.parametrize("modality", ["image", "audio"])
@settings(deadline=None)
@given(st.one_of(st.binary(max_size=99), st.text(max_size=99).map(str.encode)))
def test_text_and_noise_are_neither_images_nor_sound(modality, contents):
    with pytest.raises(
        DataError, match="^a.txt: (no image|no WAV or FLAC|holds no|damaged).*; accept"
    ):
        media.from_file(contents, "a.txt", config(modality), 8)


def test_an_array_of_modality_bytes_is_of_bytes():
    with pytest.raises(DataError, match=r"^x: is int64\[3\]; accepted is uint8$"):
        media.from_array(np.arange(3), "x", config("bytes"), 8)
