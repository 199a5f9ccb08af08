"""Lossless compression of any file with a model's predictions: bits per byte that can be held.

python -m megabyte_jax.compression encode --workdir=DIR IN OUT
python -m megabyte_jax.compression decode --workdir=DIR IN OUT

The bytes are predicted as the strategy `basic` of `megabyte_jax.evaluation` does, in windows of
seq_len bytes that know nothing of each other, and a range coder writes each in about as many bits
as its loss: a stream is as long as eval.py says, within 0.1 percent and 64 bytes. What the coder
rounds away, at most 3e-4 bits per byte, can exceed that only in a file of more than half a megabyte
that takes less than 0.3 bits per byte.

Decoding needs the checkpoint, and predictions that are the same to the last bit: the same kind of
machine and the same versions of the libraries. The stream holds a digest of the checkpoint and
checksums of itself and of the bytes, so that whatever is wrong is told and never written out.
"""

from __future__ import annotations

import functools
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import constriction
import numpy as np
from absl import flags
from numpy.typing import NDArray
from tqdm import tqdm

from megabyte_jax import cli
from megabyte_jax.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from megabyte_jax.models.config import ModelConfig
    from megabyte_jax.trained import TrainedModel

# A stream is magic with the version of the format, the first half of the model's digest, the number
# of bytes and their crc32; then the range coder's words; then the crc32 of all that.
_HEADER = struct.Struct("<4s16sQI")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"MBC\x01"

# What the range coder divides among the symbols of a table: 256 bytes, the escape, and a symbol
# that is never coded and takes what is left over.
_TOTAL = 2**24
_SYMBOLS = 258
_ESCAPE, _LEFT_OVER = 256, 257
# Bytes less probable than that are coded by an escape and a second, finer table, and so on, as a
# frequency of a few units would round their cost too much.
_LEAST = 2.0**-16
_LEAST_ESCAPE = 2**8
_SHARED = _TOTAL - _SYMBOLS - _LEAST_ESCAPE  # the rest: every symbol has a frequency of at least 1
# Ends the escapes: no byte costs more than about 1,000 bits.
_SMALLEST = 2.0**-1000

# It gives a symbol 1 + its share of _TOTAL - _SYMBOLS, in exact arithmetic if these are integers.
_CATEGORICAL = constriction.stream.model.Categorical(perfect=False)

# Windows coded together, and what their caches may take.
_MAX_ROWS = 64
_MAX_CACHE_BYTES = 2**31

# Encodes or decodes one symbol for each of some bytes of the file: from their positions int64 [B],
# which byte values their tables code, bool [B, V], and the tables, float64 [B, 258], to int32 [B].
_Code = Callable[[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]], NDArray[np.int32]]


def compress(model: TrainedModel, data: bytes) -> bytes:
    """Compresses bytes.

    Args:
        model: whose predictions are used, and needed to get the bytes back.
        data: of any length.

    Returns:
        The stream: `data` at the model's bits per byte, and 36 to 44 bytes.

    Raises:
        NonFiniteError: a prediction of the model is no number.
    """
    encoder = constriction.stream.queue.RangeEncoder()
    known = np.frombuffer(data, np.uint8)

    def encode(
        positions: NDArray[np.int64], coded: NDArray[np.bool_], frequencies: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        values = known[positions].astype(np.int32)
        symbols = np.where(coded[np.arange(len(values)), values], values, np.int32(_ESCAPE))
        encoder.encode(symbols, _CATEGORICAL, frequencies - 1)
        return symbols

    _code_windows(model, len(data), encode)
    payload = encoder.get_compressed().astype("<u4").tobytes()
    body = _HEADER.pack(_MAGIC, _short_digest(model), len(data), zlib.crc32(data)) + payload
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decompress(model: TrainedModel, stream: bytes) -> bytes:
    """Gets the bytes back.

    Args:
        model: the one that compressed them.
        stream: from `compress`.

    Raises:
        UserError: stream is foreign, damaged, cut short or of another model, or the predictions are
            not the same on this machine.
        NonFiniteError: a prediction of the model is no number.
    """
    size, checksum, words = _open(model, stream)
    decoder = constriction.stream.queue.RangeDecoder(words)

    def decode(
        _: NDArray[np.int64], coded: NDArray[np.bool_], frequencies: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        try:
            symbols = decoder.decode(_CATEGORICAL, frequencies - 1)
        except AssertionError:
            raise _other_arithmetic() from None
        is_byte = symbols < _ESCAPE
        if (symbols == _LEFT_OVER).any() or not coded[is_byte, symbols[is_byte]].all():
            raise _other_arithmetic()
        return symbols

    data = _code_windows(model, size, decode).tobytes()
    if zlib.crc32(data) != checksum or not decoder.maybe_exhausted():
        raise _other_arithmetic()
    return data


def _open(model: TrainedModel, stream: bytes) -> tuple[int, int, NDArray[np.uint32]]:
    """Takes a stream apart: the number of bytes, their checksum, the range coder's words."""
    if stream[: len(_MAGIC)] != _MAGIC:
        raise UserError(
            "no compressed stream, or one of another version; accepted is what encode made"
        )
    body, checksum = stream[: -_CHECKSUM.size], stream[-_CHECKSUM.size :]
    whole_words = len(body) >= _HEADER.size and (len(body) - _HEADER.size) % 4 == 0
    if checksum != _CHECKSUM.pack(zlib.crc32(body)) or not whole_words:
        raise UserError("damaged or cut short; accepted is a whole stream as encode made it")
    _, digest, size, data_checksum = _HEADER.unpack_from(body)
    # No byte costs less than the likeliest in a table of nothing else.
    most = (8 * (len(body) - _HEADER.size) + 64) / -math.log2((_SHARED + 1) / _TOTAL)
    if size > most or (size == 0 and len(body) > _HEADER.size):
        raise UserError("damaged: its size does not fit; accepted is a stream as encode made it")
    if digest != _short_digest(model):
        raise UserError(
            f"made with the checkpoint of digest {digest.hex()}, not with this one of "
            f"{_short_digest(model).hex()}; accepted is what this checkpoint encoded"
        )
    return size, data_checksum, np.frombuffer(body, "<u4", offset=_HEADER.size).astype(np.uint32)


def _short_digest(model: TrainedModel) -> bytes:
    return bytes.fromhex(model.digest)[:16]


def _other_arithmetic() -> UserError:
    return UserError(
        "does not decode to the bytes that were encoded, as the model predicts otherwise on this "
        "machine; accepted is the kind of machine and the versions of libraries that encoded it"
    )


def _code_windows(model: TrainedModel, size: int, code: _Code) -> NDArray[np.uint8]:
    """Runs a model over a file, byte t of many windows at a time.

    Both directions run the same programs on the same shapes, which follow from the model's config
    and the size alone: only so are the predictions the same bits. For that reason the encoder, too,
    shows the model no byte before it is coded.

    Args:
        model: predicts.
        size: of the file in bytes.
        code: as `_code_step` has it; called in the same order both ways.

    Returns:
        uint8 [size], the file.
    """
    from megabyte_jax.models import functional  # here, so that --help does not wait for JAX

    config, T, P = model.config, model.config.seq_len, model.config.patch_size
    begin_patch, next_byte = _programs()
    unstacked = functional.unstack(config, model.params)
    most = _max_rows(config)
    data = np.zeros(size, np.uint8)
    bar = tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None)
    for first in range(0, size, most * T):
        starts = np.arange(first, min(first + most * T, size), T)
        B = 1 << (len(starts) - 1).bit_length()  # powers of two: few programs
        x = np.zeros((B, T), np.uint8)
        cache = functional.init_cache(config, B)
        for t in range(min(T, size - first)):
            p = t % P
            if p == 0:
                k = np.full(B, t // P, np.int32)
                h, cache = begin_patch(config, unstacked, cache, x, k)
            before = x[:, max(t - 1, 0)]
            logits, cache = next_byte(config, unstacked, cache, h, k, np.int32(p), before)
            positions = starts[starts + t < size] + t
            n = len(positions)
            data[positions] = x[:n, t] = _code_step(np.asarray(logits)[:n], positions, code)
            bar.update(n)
    bar.close()
    return data


@functools.cache
def _programs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The decoder's two functions compiled, with caches that are updated in place."""
    import jax

    from megabyte_jax.models import functional

    begin_patch, next_byte = (
        jax.jit(function, static_argnums=0, donate_argnums=2)
        for function in (functional.begin_patch, functional.next_byte)
    )
    return begin_patch, next_byte


def _max_rows(config: ModelConfig) -> int:
    """How many windows are coded together: a power of two."""
    import jax

    from megabyte_jax.models import functional

    cache = jax.eval_shape(lambda: functional.init_cache(config, 1))
    row_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    rows = max(1, min(_MAX_ROWS, _MAX_CACHE_BYTES // row_bytes))
    return 1 << (rows.bit_length() - 1)


def _code_step(
    logits: NDArray[np.float32], positions: NDArray[np.int64], code: _Code
) -> NDArray[np.uint8]:
    """Codes bytes, each in as many symbols as its probability needs.

    Args:
        logits: float32 [B, V].
        positions: int64 [B], where in the file the bytes are.
        code: encodes or decodes a symbol of each.

    Returns:
        uint8 [B], the bytes.

    Raises:
        NonFiniteError: logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise NonFiniteError("the model's predictions are not finite")
    exact = logits.astype(np.float64)
    p = np.exp(exact - exact.max(axis=1, keepdims=True))
    p = np.maximum(p / p.sum(axis=1, keepdims=True), _SMALLEST)
    result, rows = np.zeros(len(p), np.uint8), np.arange(len(p))
    while len(rows):
        coded = p >= _LEAST
        frequencies = _frequencies(p, coded)
        symbols = code(positions[rows], coded, frequencies)
        escaped = symbols == _ESCAPE
        result[rows[~escaped]] = symbols[~escaped]
        # What the escape cost is paid: the bytes left are that much more probable.
        scale = _SHARED / frequencies[escaped, _ESCAPE]
        p = np.where(coded, 0.0, p)[escaped] * scale[:, None]
        rows = rows[escaped]
    return result


def _frequencies(p: NDArray[np.float64], coded: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Makes integers of probabilities.

    Args:
        p: float64 [B, V], each row sums up to at most 1.
        coded: bool [B, V], the bytes of this table; the others are behind its escape.

    Returns:
        float64 [B, 258] of whole numbers from 1 that sum up to `_TOTAL` in each row.
    """
    result = np.ones((len(p), _SYMBOLS))
    result[:, :_ESCAPE] += np.floor(np.where(coded, p, 0.0) * _SHARED)
    behind = np.where(coded, 0.0, p).sum(axis=1)
    result[:, _ESCAPE] += _LEAST_ESCAPE + np.floor(behind * _SHARED)
    result[:, _LEFT_OVER] += _TOTAL - result.sum(axis=1)
    return result


def main(direction: str, source: str, target: str) -> None:
    """Compresses or decompresses a file and prints the sizes."""
    from megabyte_jax import trained

    if direction not in ("encode", "decode"):
        raise UserError(f"{direction!r}: accepted is encode or decode")
    data = _read(Path(source))
    model = trained.load(flags.FLAGS.workdir)
    cli.require_writable("OUT", target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"OUT={target}: accepted is another file than IN")
    try:
        made = (compress if direction == "encode" else decompress)(model, data)
    except UserError as error:
        raise UserError(f"IN={source}: {error}") from None
    cli.write_file("OUT", target, made)
    size, compressed = map(len, (data, made) if direction == "encode" else (made, data))
    line = f"{size:,} bytes, compressed {compressed:,}"
    if size:
        line += f": {8 * compressed / size:.4f} bits per byte, ratio {size / compressed:.2f}"
    print(line)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"IN={path}: {error.strerror}; accepted is a readable file") from None


if __name__ == "__main__":
    # Here, so that whoever imports this module can have a flag of that name.
    flags.DEFINE_string("workdir", None, "Directory of a trained run.", required=True)
    cli.run(main, ("encode|decode", "IN", "OUT"))
