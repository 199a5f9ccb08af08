import gzip
import io
import lzma
import math
from collections import Counter

import numpy as np
import pytest
import soundfile
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from megabyte_jax import plots
from megabyte_jax.data import images, statistics
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.flat import flatten
from megabyte_jax.text import printable
from tests.runs import corpus_of

P = 12


def data_config(modality="bytes", height=4, width=6, scan="patch", sample_rate=100):
    data = base.get_config().data
    data.modality = modality
    data.image.update(height=height, width=width, scan=scan)
    data.audio.sample_rate = sample_rate
    return data


def measured(*documents, num_bytes=10**6, **config):
    return statistics.measure(corpus_of(*documents), data_config(**config), P, num_bytes, "x")


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_entropy_is_that_of_the_counts(data):
    counts = Counter(data).values()
    expected = -sum(n / len(data) * math.log2(n / len(data)) for n in counts)
    assert statistics.entropy(np.frombuffer(data, np.uint8)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("data, bits", [(bytes(99), 0), (b"ab" * 9, 1), (bytes(range(256)), 8)])
def test_entropy_of_what_is_known(data, bits):
    assert measured(data).bits_per_byte["order-0 entropy"] == pytest.approx(bits)


def test_a_corpus_is_counted():
    result = measured(b"abc", b"a" * 10, b"", b"bc")
    assert (result.documents, result.bytes, result.measured) == (4, 15, 15)
    assert (result.shortest, result.longest) == (0, 10)


def test_compressors_get_the_documents_one_after_another():
    rng = np.random.default_rng(0)
    words = [rng.bytes(n) for n in (3, 5, 8, 13)]
    documents = [b" ".join(words[i] for i in rng.integers(0, 4, 99)) for _ in range(30)]
    whole = b"".join(documents)
    bits = measured(*documents).bits_per_byte
    # What each makes of it by its simplest interface, in which zstd notes the size, and that is
    # all: a window beyond 8 MiB changes nothing for less than that.
    sizes = {
        "gzip -9": (len(gzip.compress(whole, 9)), 0),
        "xz -9e": (len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)), 0),
        "zstd -19": (len(zstandard.ZstdCompressor(level=19).compress(whole)), 30),
    }
    assert [*bits] == ["order-0 entropy", *sizes]
    for name, (size, tolerance) in sizes.items():
        assert bits[name] * len(whole) / 8 == pytest.approx(size, abs=tolerance + 1e-6), name


def test_zstd_looks_back_further_than_eight_megabytes():
    noise = np.random.default_rng(0).bytes(9 * 2**20)
    assert measured(noise, noise, num_bytes=10**8).bits_per_byte["zstd -19"] < 4.1


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=30), st.integers(1, 200))
def test_a_sample_is_whole_documents_in_order_and_the_last_one_cut(documents, num_bytes):
    parts = [part.tobytes() for part in statistics.sample(corpus_of(*documents), num_bytes)]
    assert sum(map(len, parts)) == min(num_bytes, sum(map(len, documents)))
    left = iter(documents)
    for part in parts[:-1]:
        assert part in left  # which takes from the iterator what comes before it, too
    if sum(map(len, documents)) <= num_bytes:
        assert b"".join(parts) == b"".join(documents)


def test_a_sample_is_spread_over_the_corpus(tmp_path):
    numbers = (bytes([number]) * 10 for number in range(256))
    corpus = flatten(str(tmp_path), "x", {}, numbers, BadRecords(0))
    for num_bytes in (160, 640):
        seen = np.array([part[0] for part in statistics.sample(corpus, num_bytes)], float)
        assert len(seen) == num_bytes / 10 and (np.diff(seen) > 0).all()
        quarters = np.bincount((seen // 64).astype(int), minlength=4) / len(seen)
        assert (quarters > 0.1).all() and (quarters < 0.5).all()


@pytest.mark.parametrize("scan", ["raster", "patch"])
def test_png_is_of_each_image_and_its_headers_count(scan):
    pixels = [np.random.default_rng(n).integers(0, 9, (4, 6, 3), np.uint8) for n in range(3)]
    documents = [images.to_bytes(image, scan, P) for image in pixels]
    total = 0
    for image in pixels[:2]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        total += len(file.getvalue())
    bits = measured(*documents[:2], modality="image", scan=scan).bits_per_byte
    assert bits["PNG"] == 8 * total / (2 * 72)
    # Half an image is none.
    cut = statistics.measure(corpus_of(documents[0]), data_config("image", scan=scan), P, 71, "x")
    assert cut.measured == 71 and cut.bits_per_byte["PNG"] is None


def test_flac_is_of_each_sound(tmp_path):
    t = np.arange(5000) / 100
    sounds = [(9000 * np.sin(f * t)).astype("<i2") for f in (3, 5)]
    bits = measured(*(sound.tobytes() for sound in sounds), modality="audio").bits_per_byte
    for number, sound in enumerate(sounds):
        path = tmp_path / f"{number}.flac"
        soundfile.write(path, sound, 100, "PCM_16", compression_level=1.0)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert bits["FLAC -8"] == 8 * total / 20_000 < bits["gzip -9"]


@pytest.mark.parametrize("sample_rate", [1, 7, 44_101, 10**9])
def test_flac_takes_any_rate_and_half_a_sample(sample_rate):
    bits = measured(b"abcde", b"a", modality="audio", sample_rate=sample_rate).bits_per_byte
    assert bits["FLAC -8"] > 8


def test_the_table_has_a_column_for_each_split():
    train, test = measured(b"abab", b"abababab"), measured(b"a" * 12345)
    lines = statistics.table({"train": train, "valid": None, "test": test}).splitlines()
    rows = {line[:30].strip(): line[30:].split() for line in lines}
    assert len({*map(len, lines)}) == 1
    assert rows[""] == ["train", "valid", "test"]
    assert rows["documents"] == ["2", "-", "1"]
    assert rows["bytes"] == ["12", "-", "12,345"]
    assert rows["mean document, bytes"] == ["6.0", "-", "12,345.0"]
    assert rows["shortest"] == ["4", "-", "12,345"]
    assert rows["longest"] == ["8", "-", "12,345"]
    assert rows["order-0 entropy, bits per byte"] == ["1.0000", "-", "0.0000"]


def test_the_excerpt_is_the_beginning_of_the_first_rows():
    batch = np.random.default_rng(0).integers(0, 256, (9, 500), np.uint8)
    expected = [f"row {n}: {printable(batch[n, :200].tobytes())}" for n in range(4)]
    assert statistics.excerpt(batch) == "\n".join(expected)
    assert statistics.excerpt(np.array([[97]], np.uint8)) == "row 0: a"


def pixels_of(png):
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return np.asarray(image)


@pytest.mark.parametrize("scan", ["raster", "patch"])
def test_the_picture_has_the_pixels_of_the_images(scan):
    rows = np.random.default_rng(0).integers(0, 256, (4, 4, 6, 3), np.uint8)
    batch = np.stack([np.frombuffer(images.to_bytes(row, scan, P), np.uint8) for row in rows])
    drawn = pixels_of(statistics.picture(batch, data_config("image", scan=scan), P))
    assert drawn.shape == (2 * 4 + 2, 2 * 6 + 2, 3)
    for number, row in enumerate(rows):
        top, left = number // 2 * 6, number % 2 * 8
        np.testing.assert_array_equal(drawn[top : top + 4, left : left + 6], row)


@pytest.mark.parametrize("size, height", [(1, 2), (36, 2), (37, 4), (72, 4), (75, 6), (144, 8)])
def test_rows_that_are_no_image_go_as_far_as_they_go(size, height):
    row = np.random.default_rng(0).integers(1, 256, size, np.uint8)
    drawn = pixels_of(statistics.picture(row[None], data_config("image"), P))
    assert drawn.shape == (height, 6, 3)
    # Block by block of 2 x 2 pixels, three beside one another.
    blocks = [
        drawn[y : y + 2, x : x + 2].ravel() for y in range(0, height, 2) for x in range(0, 6, 2)
    ]
    flat = np.concatenate(blocks)
    np.testing.assert_array_equal(flat[:size], row)
    assert not flat[size:].any()


@pytest.mark.parametrize("num_bytes", [400, 401])
def test_sound_is_drawn_in_whole_samples(num_bytes):
    samples = (9000 * np.sin(np.arange(400).reshape(2, 200) / 9)).astype("<i2")
    batch = np.zeros((2, num_bytes), np.uint8)
    batch[:, :400] = samples.view(np.uint8)
    drawn = statistics.picture(batch, data_config("audio"), P)
    assert drawn == plots.waveforms(samples, 100)
