import io
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs import base
from megabyte_jax.data import media


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
