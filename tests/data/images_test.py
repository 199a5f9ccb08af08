import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megabyte_jax.data import images
from megabyte_jax.errors import UserError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def scan_by_definition(pixels, p):
    """Blocks of p x p pixels in raster order, pixels within each too, channels together."""
    height, width = pixels.shape[:2]
    made = []
    for top in range(0, height, p):
        for left in range(0, width, p):
            for row in range(top, top + p):
                for column in range(left, left + p):
                    made += [int(pixels[row, column, channel]) for channel in range(3)]
    return bytes(made)


@settings(deadline=None)
@given(*[st.integers(1, 4)] * 3, st.sampled_from(["raster", "patch"]), st.integers(0, 9))
def test_a_scan_is_that_of_the_definition_and_is_undone_exactly(rows, columns, p, scan, seed):
    pixels = noise(rows * p, columns * p, seed)
    data = images.to_bytes(pixels, scan, 3 * p * p)
    assert data == scan_by_definition(pixels, p if scan == "patch" else 1)
    undone = images.to_pixels(data, rows * p, columns * p, scan, 3 * p * p)
    assert undone.dtype == np.uint8 and np.array_equal(undone, pixels)


def test_the_scans_of_a_small_image_by_hand():
    red = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    pixels = np.stack([red, red + 100, red + 200], -1)
    assert list(images.to_bytes(pixels, "patch", 12)[::3]) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert list(images.to_bytes(pixels, "raster", 12)[:6]) == [0, 100, 200, 1, 101, 201]
    assert images.to_bytes(pixels, "raster", 8) == pixels.tobytes()


@pytest.mark.parametrize("scan, step", [("raster", 1), ("patch", 2)])
def test_the_first_rows_are_the_first_bytes(scan, step):
    pixels = noise(6, 4)
    data = images.to_bytes(pixels, scan, 12)
    for rows in range(0, 7, step):
        assert data.startswith(images.to_bytes(pixels[:rows], scan, 12))


def test_a_block_fills_a_patch_or_the_patch_size_is_refused():
    sides = {3 * side * side: side for side in range(1, 99)}
    for patch_size in range(1, 1000):
        assert images.block_side("raster", patch_size) == 1
        if patch_size in sides:
            assert images.block_side("patch", patch_size) == sides[patch_size]
            continue
        with pytest.raises(UserError, match=f"^model.patch_size={patch_size}: accepted is 3 times"):
            images.block_side("patch", patch_size)


def file_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_a_png_comes_back_exactly_and_others_can_read_it(height, width, seed):
    pixels = noise(height, width, seed)
    data = images.encode(pixels)
    assert np.array_equal(images.decode(data, "x", height, width), pixels)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        assert [image.getpixel((width - 1, 0))] == [tuple(pixels[0, -1].tolist())]


def test_grey_palettes_and_jpeg_are_read_as_their_colours():
    grey = noise(5, 7)[..., 0]
    expected = np.repeat(grey[..., None], 3, -1)
    assert np.array_equal(images.decode(file_of(Image.fromarray(grey)), "x", 5, 7), expected)
    palette = Image.fromarray(grey // 16 * 16).convert("P")
    assert np.array_equal(images.decode(file_of(palette), "x", 5, 7), expected // 16 * 16)
    flat = np.full((8, 16, 3), 90, np.uint8)
    jpeg = file_of(Image.fromarray(flat), "JPEG")
    assert np.array_equal(images.decode(jpeg, "x", 8, 16), flat)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P"])
def test_transparency_and_deeper_colours_are_refused(mode):
    options = {"transparency": 0} if mode == "P" else {}
    data = file_of(Image.new(mode, (7, 5)), **options)
    with pytest.raises(UserError, match=f"^the file: has the colours {mode}; accepted is RGB"):
        images.decode(data, "the file", 5, 7)


def test_another_size_is_refused_with_both():
    with pytest.raises(UserError, match=r"^x: has 5 x 7 pixels .*accepted is .* = 7 x 5$"):
        images.decode(images.encode(noise(5, 7)), "x", 7, 5)


PNG = images.encode(noise(5, 7))


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=99),
        st.integers(0, len(PNG) - 1).map(lambda end: PNG[:end]),
        st.tuples(st.integers(0, len(PNG) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda change: PNG[: change[0]] + change[1] + PNG[change[0] + len(change[1]) :]
        ),
    )
)
def test_damaged_data_is_an_image_of_the_size_or_one_error(data):
    try:
        assert images.decode(data, "x", 5, 7).shape == (5, 7, 3)
    except UserError as error:
        assert str(error).startswith("x: ") and "accepted is" in str(error)


def test_sixteen_bits_of_a_colour_are_not_cut_to_eight():
    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = zlib.compress(b"\0" + bytes(range(12)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(UserError, match="x: has the colours RGB; accepted is RGB, .* of 8 bits"):
        images.decode(png, "x", 1, 2)
