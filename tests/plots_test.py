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
