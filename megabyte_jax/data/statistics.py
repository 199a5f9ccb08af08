"""What a corpus holds and what compressors make of it, to be known before a model is trained.

Letters: B batch, T bytes of a window, N documents.
"""

import io
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from tqdm import tqdm

from megabyte_jax.data import images, media
from megabyte_jax.data.corpus import Corpus
from megabyte_jax.data.windows import permute
from megabyte_jax.text import printable

_PIECE = 2**20  # bytes given to a compressor between two steps of the bar
_EXCERPT_ROWS, _EXCERPT = 4, 200  # rows of a batch, and bytes of each
_ZSTD_WINDOW_LOG = 27  # 128 MiB; that of level 19 alone is 8


@dataclass(frozen=True)
class Statistics:
    """What there is to know of a split. All sizes are in bytes.

    Attributes:
        documents: their number.
        bytes: of all of them.
        shortest: size of the shortest.
        longest: size of the longest.
        measured: bytes that `bits_per_byte` was measured on; see `sample`.
        bits_per_byte: by the name of the measure; None where there was not one whole document.
    """

    documents: int
    bytes: int
    shortest: int
    longest: int
    measured: int
    bits_per_byte: Mapping[str, float | None]


def measure(corpus: Corpus, data: Any, patch_size: int, num_bytes: int, name: str) -> Statistics:
    """Counts a corpus, and measures its entropy and what compressors make of it.

    The compressors get the documents one after another, as one file. PNG and FLAC get each by
    itself, because a file of them holds one image or sound, and their headers count.

    Args:
        corpus: at least one byte, as `datasets.open_splits` gives it.
        data: the config's, validated.
        patch_size: P in bytes.
        num_bytes: at most so many are compressed, at least 1.
        name: what the progress bar shows.

    Raises:
        DataError: a file was removed or has shrunk since the corpus was opened.
    """
    sizes = np.diff(corpus.offsets)
    documents = sample(corpus, num_bytes)
    joined = np.concatenate(documents)
    bits: dict[str, float | None] = {"order-0 entropy": entropy(joined)}
    compressors, encoders = _compressors(), _encoders(data, patch_size)
    total = len(joined) * (len(compressors) + len(encoders))
    with tqdm(total=total, desc=name, leave=False, disable=None, unit="B", unit_scale=True) as bar:
        for label, compressor in compressors.items():
            bits[label] = 8 * _compressed_size(compressor, joined, bar.update) / len(joined)
        for label, encode in encoders.items():
            bits[label] = _encoded_bits(encode, documents, media.unit(data), bar.update)
    return Statistics(
        documents=len(corpus),
        bytes=corpus.num_bytes,
        shortest=int(sizes.min()),
        longest=int(sizes.max()),
        measured=len(joined),
        bits_per_byte=bits,
    )


def sample(corpus: Corpus, num_bytes: int) -> list[NDArray[np.uint8]]:
    """Reads documents that are spread over a corpus, in its order.

    Args:
        corpus: of any size; only what is returned is read.
        num_bytes: how many at most. The last document is cut to keep to it.

    Returns:
        uint8[bytes] of each document.
    """
    # In a pseudo-random order: a regular one could meet one kind of document only.
    order = permute(np.arange(len(corpus)), len(corpus), key=0)
    ends = np.cumsum(np.diff(corpus.offsets)[order])
    taken = order[: np.searchsorted(ends, num_bytes) + 1]
    documents = []
    for number in np.sort(taken).tolist():
        document = corpus.documents[number]
        out = np.empty(min(len(document), num_bytes), np.uint8)
        document.read(0, out)
        documents.append(out)
        num_bytes -= len(out)
        if not num_bytes:
            break
    return documents


def entropy(data: NDArray[np.uint8]) -> float:
    """Returns the order-0 entropy of at least one byte, in bits per byte."""
    p = np.bincount(data) / len(data)
    p = p[p > 0]
    return float(p @ np.log2(1 / p))


def _compressors() -> dict[str, Any]:
    zstd = zstandard.ZstdCompressionParameters.from_level(
        19, window_log=_ZSTD_WINDOW_LOG, enable_ldm=True
    )
    return {
        "gzip -9": zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS),  # 16 stands for gzip's header
        "xz -9e": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": zstandard.ZstdCompressor(compression_params=zstd).compressobj(),
    }


def _compressed_size(
    compressor: Any, data: NDArray[np.uint8], advance: Callable[[int], object]
) -> int:
    size = 0
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        size += len(compressor.compress(piece.tobytes()))
        advance(len(piece))
    return size + len(compressor.flush())


def _encoders(data: Any, patch_size: int) -> Mapping[str, Callable[[bytes], bytes]]:
    """The file formats that documents of the modality usually have, without their losses."""

    def png(document: bytes) -> bytes:
        from PIL import Image

        height, width, scan = data.image.height, data.image.width, data.image.scan
        pixels = images.to_pixels(document, height, width, scan, patch_size)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        return file.getvalue()

    def flac(document: bytes) -> bytes:
        import soundfile

        file, samples = io.BytesIO(), np.frombuffer(document, "<i2")
        # FLAC has no rate above 655,350; which one it is changes no more than a header.
        rate = min(data.audio.sample_rate, 655_350)
        soundfile.write(file, samples, rate, "PCM_16", format="FLAC", compression_level=1.0)
        return file.getvalue()

    if data.modality == "bytes":
        return {}
    return {"PNG": png} if data.modality == "image" else {"FLAC -8": flac}


def _encoded_bits(
    encode: Callable[[bytes], bytes],
    documents: Sequence[NDArray[np.uint8]],
    unit: int,
    advance: Callable[[int], object],
) -> float | None:
    """What files of the documents need, in bits per byte of their whole images or samples."""
    raw = encoded = 0
    for document in documents:
        whole = document[: len(document) // unit * unit].tobytes()
        if whole:
            raw += len(whole)
            encoded += len(encode(whole))
        advance(len(document))
    return 8 * encoded / raw if raw else None


def table(splits: Mapping[str, Statistics | None]) -> str:
    """Lays out the statistics of splits side by side.

    Args:
        splits: by name; None for an empty one, which is shown as `-`.
    """
    rows = {"": list(splits)}
    columns = [_column(statistics) for statistics in splits.values() if statistics]
    for label in columns[0]:
        cells = iter(column[label] for column in columns)
        rows[label] = [next(cells) if statistics else "-" for statistics in splits.values()]
    first = max(map(len, rows))
    width = 2 + max(len(cell) for cells in rows.values() for cell in cells)
    lines = (
        label.ljust(first) + "".join(cell.rjust(width) for cell in cells)
        for label, cells in rows.items()
    )
    return "\n".join(lines)


def _column(statistics: Statistics) -> dict[str, str]:
    bits = {
        f"{label}, bits per byte": "-" if value is None else f"{value:.4f}"
        for label, value in statistics.bits_per_byte.items()
    }
    return {
        "documents": f"{statistics.documents:,}",
        "bytes": f"{statistics.bytes:,}",
        "mean document, bytes": f"{statistics.bytes / statistics.documents:,.1f}",
        "shortest": f"{statistics.shortest:,}",
        "longest": f"{statistics.longest:,}",
        "bytes measured": f"{statistics.measured:,}",
        **bits,
    }


def excerpt(batch: NDArray[np.uint8]) -> str:
    """Shows the beginnings of the first rows of a batch, uint8[B, T], as text, a row on a line."""
    rows = [
        f"row {number}: {printable(row[:_EXCERPT].tobytes())}"
        for number, row in enumerate(batch[:_EXCERPT_ROWS])
    ]
    return "\n".join(rows)


def picture(batch: NDArray[np.uint8], data: Any, patch_size: int) -> bytes:
    """Draws a batch, the pixels of its images or the waveforms of its sound.

    Rows that are no whole image show their blocks in lines of the image's width, as far as they go.

    Args:
        batch: uint8[B, T].
        data: the config's, validated, of modality image or audio.
        patch_size: P in bytes.

    Returns:
        A PNG file.
    """
    from megabyte_jax import plots

    if data.modality == "audio":
        samples = batch[:, : batch.shape[1] // 2 * 2].view("<i2")
        return plots.waveforms(samples, data.audio.sample_rate)
    width, scan = data.image.width, data.image.scan
    side = images.block_side(scan, patch_size)
    line = 3 * width * side  # bytes of the blocks beside one another
    lines = -(-batch.shape[1] // line)
    pixels = [
        images.to_pixels(
            row.tobytes().ljust(lines * line, b"\0"), lines * side, width, scan, patch_size
        )
        for row in batch
    ]
    return images.encode(plots.grid(np.stack(pixels)))
