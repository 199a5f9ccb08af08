import io
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from megabyte_jax.data import images
from megabyte_jax.errors import DataError, UserError


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


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_a_byte_of_the_patch_scan_is_where_the_formula_says(p):
    pixels = noise(3 * p, 2 * p)
    y, x, channel = np.indices(pixels.shape)
    place = (y // p * 2 + x // p) * 3 * p * p + (y % p * p + x % p) * 3 + channel
    scanned = np.frombuffer(images.to_bytes(pixels, "patch", 3 * p * p), np.uint8)
    assert np.array_equal(scanned[place], pixels)


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
    with pytest.raises(DataError, match=f"^the file: has the colours {mode}; accepted is RGB"):
        images.decode(data, "the file", 5, 7)


def test_another_size_is_refused_with_both():
    with pytest.raises(DataError, match=r"^x: has 5 x 7 pixels .*accepted is .* = 7 x 5$"):
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
    except DataError as error:
        assert str(error).startswith("x: ") and "accepted is" in str(error)


def test_sixteen_bits_of_a_colour_are_not_cut_to_eight():
    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = zlib.compress(b"\0" + bytes(range(12)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="x: has the colours RGB; accepted is RGB, .* of 8 bits"):
        images.decode(png, "x", 1, 2)


FILTERS = images.RESIZE[1:]


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("height, width", [(6, 10), (15, 25), (45, 75), (3, 5)])
def test_an_image_of_the_same_shape_is_resized_as_pillow_does(resize, height, width):
    pixels = noise(30, 50)
    method = Image.Resampling[resize.upper()]
    expected = np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), method))
    assert np.array_equal(images.fit(pixels, "x", height, width, resize), expected)
    assert np.array_equal(
        images.decode(file_of(Image.fromarray(pixels)), "x", height, width, resize), expected
    )


def test_a_box_filter_is_the_mean_of_a_block():
    pixels = noise(8, 12)
    mean = pixels.reshape(4, 2, 6, 2, 3).mean((1, 3))
    error = images.fit(pixels, "x", 4, 6, "box") - mean
    assert np.abs(error).max() <= 1  # rounded along rows, then along columns


@pytest.mark.parametrize(
    "size, wanted, rows, columns",
    [
        ((6, 10), (3, 3), (0, 6), (2, 8)),  # 6 x 6 in the middle
        ((10, 6), (3, 3), (2, 8), (0, 6)),
        ((6, 9), (3, 3), (0, 6), (1, 7)),  # of three columns two go on the right
        ((9, 8), (2, 4), (2, 6), (0, 8)),
        ((7, 20), (4, 8), (0, 7), (3, 17)),
        ((1, 90), (5, 3), (0, 1), (44, 45)),  # at least one pixel stays
        ((90, 1), (3, 5), (44, 45), (0, 1)),
    ],
)
@pytest.mark.parametrize("resize", FILTERS)
def test_the_middle_of_another_shape_is_resized(size, wanted, rows, columns, resize):
    pixels = noise(*size)
    middle = Image.fromarray(pixels[slice(*rows), slice(*columns)])
    expected = middle.resize(wanted[::-1], Image.Resampling[resize.upper()])
    assert np.array_equal(images.fit(pixels, "x", *wanted, resize), np.asarray(expected))


@settings(deadline=None)
@given(*[st.integers(1, 40)] * 4, st.sampled_from(FILTERS))
def test_any_size_becomes_the_one_asked_for_and_that_one_stays(H0, W0, height, width, resize):
    pixels = noise(H0, W0)
    fitted = images.fit(pixels, "x", height, width, resize)
    assert fitted.shape == (height, width, 3) and fitted.dtype == np.uint8
    assert np.array_equal(images.fit(fitted, "x", height, width, resize), fitted)
    assert np.array_equal(images.fit(pixels, "x", H0, W0, resize), pixels)


@pytest.mark.parametrize("resize, height", [("lanczos", 4), ("none", 6)])
def test_a_grey_array_is_the_same_three_times(resize, height):
    grey = noise(6, 6)[..., :1]
    expected = images.fit(np.repeat(grey, 3, 2), "x", height, height, resize)
    assert np.array_equal(images.fit(grey, "x", height, height, resize), expected)


def test_the_colours_of_a_palette_are_mixed_and_not_their_numbers():
    palette = Image.new("P", (2, 2))
    palette.putpalette([200, 0, 0, 9, 9, 9, 0, 100, 0])
    palette.putdata([0, 2, 2, 0])
    assert images.decode(file_of(palette), "x", 1, 1, "box").tolist() == [[[100, 50, 0]]]


@pytest.mark.parametrize("resize", ["none", "box"])
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_refused(array, resize):
    with pytest.raises(
        DataError, match="^record 7: (is uint|has [04] x [04] pixels).*; accepted is"
    ):
        images.fit(array, "record 7", 4, 4, resize)


def test_an_image_too_large_to_decode_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 17)
    with pytest.raises(DataError, match=r"^x: Image size \(35 pixels\) exceeds limit .* smaller"):
        images.decode(images.encode(noise(5, 7)), "x", 5, 7)


def test_colours_for_print_are_refused():
    cmyk = file_of(Image.new("CMYK", (7, 5)), "JPEG")
    with pytest.raises(DataError, match="^x: has the colours CMYK; accepted is RGB"):
        images.decode(cmyk, "x", 5, 7, "box")


def test_an_image_is_not_turned_as_a_camera_noted():
    exif = Image.Exif()
    exif[274] = 6
    data = file_of(Image.fromarray(noise(8, 16)), "JPEG", exif=exif)
    assert np.array_equal(images.decode(data, "x", 8, 16), np.asarray(Image.open(io.BytesIO(data))))


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([y * 5, x * 4, x * y % 256], -1).astype(np.uint8))


FILES = {
    "png": file_of(smooth(20, 28)),
    "jpeg": file_of(smooth(20, 28), "JPEG"),
    "progressive": file_of(smooth(20, 28), "JPEG", progressive=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_anywhere_is_refused_or_whole(kind):
    whole = images.decode(FILES[kind], "x", 20, 28)
    refused = 0
    for size in range(len(FILES[kind])):
        try:
            assert np.array_equal(images.decode(FILES[kind][:size], "x", 20, 28), whole), size
        except DataError:
            refused += 1
    assert refused >= len(FILES[kind]) - 4  # the checksum at the end of a PNG, of no pixels


def test_a_png_with_a_flipped_bit_is_refused_or_whole():
    data = FILES["png"]
    whole = images.decode(data, "x", 20, 28)
    for place in range(len(data)):
        flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        try:
            assert np.array_equal(images.decode(flipped, "x", 20, 28), whole), place
        except DataError:
            pass


def test_threads_decode_at_once_and_damaged_notes_of_a_camera_warn_nobody():
    exif = b"Exif\0\0MM\0*\0\0\0\10\0\1\1\32\0\5\0\0\0\1\0\0\377\0\0\0\0\0"
    data = file_of(smooth(20, 28), "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="EXIF|data|Truncated"):
        Image.open(io.BytesIO(data)).getexif()
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: images.decode(data, "x", 20, 28), range(200)))
    assert all(np.array_equal(one, made[0]) for one in made)
    assert warnings.filters == filters
