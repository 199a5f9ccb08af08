import io

import numpy as np
import pytest
from PIL import Image

from megabyte_jax import plots


def pixels(**changes):
    report = {
        "dataset": "enwik8",
        "split": "test",
        "strategy": "sliding",
        "stride": 256,
        "context": 512,
        "bits_per_byte_by_position": [1.5, 1.25, None, 2.0],
        "context_bin": 1,
        "bits_per_byte_by_context": [*np.linspace(3, 1, 511).tolist(), None],
    }
    png = plots.loss_by_position({**report, **changes})
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return np.array(image)


def test_the_plot_shows_its_report():
    image = pixels()
    assert image.shape[0] > 400 and image.shape[1] > 1000
    np.testing.assert_array_equal(image, pixels())
    for changes in (
        {"dataset": "text8"},
        {"split": "valid"},
        {"strategy": "basic"},
        {"stride": 128},
        {"context": 513},
        {"context_bin": 2},
        {"bits_per_byte_by_position": [1.5, 1.25, None, 2.1]},
        {"bits_per_byte_by_context": np.linspace(3, 1.1, 512).tolist()},
    ):
        other = pixels(**changes)
        assert other.shape != image.shape or (other != image).any(), changes


@pytest.mark.parametrize(
    "name", ["$x_{", "$a$", "\udcff\n\0", "字" * 40, "long/" * 80, "a'b\"", ""]
)
def test_any_name_of_a_dataset_is_drawn(name):
    assert (pixels(dataset=name) != pixels(dataset="other")).any()


@pytest.mark.parametrize("none", [[None], [None] * 8])
def test_what_has_no_losses_is_drawn_empty(none):
    empty = pixels(bits_per_byte_by_position=none, bits_per_byte_by_context=none * 3)
    red_is_blue = [(image[..., 0] == image[..., 2]).all() for image in (empty, pixels())]
    assert red_is_blue == [True, False]  # the curves alone have a colour


def curves(samples, sample_rate=100):
    """The rows of pixels, in a drawing of sounds, that have the colour of a curve."""
    with Image.open(io.BytesIO(plots.waveforms(samples, sample_rate)), formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return pixels.shape, np.flatnonzero((abs(np.diff(pixels, axis=2)) > 40).any((1, 2)))


def test_waveforms_go_as_far_as_the_sound():
    silence, t = np.zeros((1, 1000), np.int16), np.arange(1000) / 100
    shape, flat = curves(silence)
    quiet, loud = (
        curves((amplitude * np.sin(9 * t)).astype(np.int16)[None])[1] for amplitude in (8000, 32000)
    )
    assert 0 < np.ptp(flat) + 1 < 4 < np.ptp(quiet) < np.ptp(loud) / 3 < shape[0]
    assert curves(silence, 50)[0] == shape


def test_many_waveforms_are_the_first_ones():
    samples = np.random.default_rng(0).integers(-9000, 9000, (20, 50)).astype(np.int16)
    one, few, many = (curves(samples[:n])[0][0] for n in (1, 16, 20))
    assert one < few == many
    assert plots.waveforms(samples, 10) == plots.waveforms(samples[:16], 10)
    assert plots.waveforms(samples, 10) != plots.waveforms(samples[::-1], 10)


@pytest.mark.parametrize(
    "shape, lines, columns",
    [
        ((1, 3, 5), 1, 1),
        ((4, 5, 5), 2, 2),
        ((5, 5, 5), 3, 2),
        ((6, 2, 90), 6, 1),
        ((3, 90, 2), 1, 3),
    ],
)
def test_a_grid_has_every_image_once_in_order(shape, lines, columns):
    images = np.random.default_rng(0).integers(0, 100, (*shape, 3), np.uint8)
    H, W = shape[1:]
    drawn = plots.grid(images)
    assert drawn.shape == (lines * (H + 2) - 2, columns * (W + 2) - 2, 3)
    rest = drawn.copy()
    for number, image in enumerate(images):
        top, left = number // columns * (H + 2), number % columns * (W + 2)
        np.testing.assert_array_equal(drawn[top : top + H, left : left + W], image)
        rest[top : top + H, left : left + W] = 128
    assert (rest == 128).all()
