"""Sound as bytes: WAV and FLAC files in, WAV files out, whose headers are no part of the data.

The bytes are samples of 16 bits in one channel, as in the paper. Their order, of which the paper
says nothing, is that of WAV: little-endian.
"""

import hashlib
import io
import wave
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_jax.errors import DataError

SAMPLE_BYTES = 2

_FULL_SCALE = 2**15  # a sample that is 1.0 as a fraction
_MAX_SAMPLES = 2**28  # of a file, in all channels; four hours at 16,000 per second
_ALWAYS_SAMPLES, _SAMPLES_PER_BYTE = 2**24, 16  # of a FLAC file; silence has hundreds per byte
_MAX_UPSAMPLING = 100  # beyond it the rate is a damaged one, which would make gigabytes of little
# Bytes per sample of what files hold, and a type that has room for every one.
_ENCODINGS = {
    "PCM_S8": (1, "int16"),
    "PCM_U8": (1, "int16"),
    "PCM_16": (2, "int16"),
    "PCM_24": (3, "float64"),
    "PCM_32": (4, "float64"),
    "FLOAT": (4, "float64"),
    "DOUBLE": (8, "float64"),
}
_NO_MD5 = bytes(16)


def decode(data: bytes, name: str, sample_rate: int) -> bytes:
    """Reads the samples of a WAV or FLAC file.

    A file that has 16 bits, one channel and the rate comes back sample for sample; see `convert`
    for others. A file is held to the length in its header, which it must have (in one written into
    a pipe there is none), and a FLAC to its checksums. WAV has none.

    Args:
        data: contents of the file.
        name: what the user calls it, for the error.
        sample_rate: of the result, in samples per second.

    Returns:
        SAMPLE_BYTES bytes per sample.

    Raises:
        DataError: it is no such file, is damaged, cut short, compressed (of WAV), or holds no
            sound.
    """
    is_flac = data.startswith(b"fLaC")
    if not is_flac and not (data.startswith(b"RIFF") and data[8:12] == b"WAVE"):
        raise DataError(f"{name}: no WAV or FLAC file; accepted is one of these")
    promised = _flac_frames(data) if is_flac else _wav_size(data, name)
    if promised == 0:
        raise DataError(
            f"{name}: holds no sound or its header does not say how much; accepted is a WAV or "
            "FLAC file with a length, as programs write it into a file and not into a pipe"
        )
    # Silence takes next to nothing in a file. Bits 4 to 6 of byte 20 are the channels less one.
    most = min(_MAX_SAMPLES, _ALWAYS_SAMPLES + _SAMPLES_PER_BYTE * len(data))
    if is_flac and promised * (1 + (data[20] >> 1) % 8) > most:
        raise DataError(
            f"{name}: promises {promised:,} samples in each channel; accepted is at most {most:,} "
            f"in all of a file of {len(data):,} bytes"
        )
    samples, rate, width = _read(data, name)
    if is_flac:
        whole = len(samples) == promised and data[26:42] in (_NO_MD5, _md5(samples, width))
    else:
        whole = samples.size * width == promised
    if not whole:
        raise DataError(
            f"{name}: damaged, its samples and its header differ; accepted is an intact file"
        )
    return convert(samples, name, rate, sample_rate)


def convert(samples: NDArray[Any], name: str, rate: int, sample_rate: int) -> bytes:
    """Writes sound as bytes, in one channel and of one rate.

    Channels are averaged, another rate is resampled (soxr's VHQ), and what is then no whole number
    of 16 bits is rounded, the half to even, and clipped. Nothing of this is done where there is no
    need.

    Args:
        samples: [N] or [N, channels]; whole numbers of 16 bits in any signed type, or fractions of
            full scale, from -1 to 1, in a floating-point type.
        name: what the user calls it, for the error.
        rate: that it has, in samples per second.
        sample_rate: that the result has.

    Returns:
        SAMPLE_BYTES bytes per sample.

    Raises:
        DataError: it is no such array, or no sample is left.
    """
    whole = samples.dtype.kind == "i"
    if samples.ndim not in (1, 2) or not (whole or samples.dtype.kind == "f"):
        raise DataError(
            f"{name}: is {samples.dtype}{list(samples.shape)}; accepted is [samples] or [samples, "
            "channels] of signed whole numbers or of fractions"
        )
    if whole and (samples != samples.astype(np.int16)).any():
        raise DataError(f"{name}: has numbers of more than 16 bits; accepted is at most 16 bits")
    if sample_rate > _MAX_UPSAMPLING * rate:
        raise DataError(
            f"{name}: has {rate} samples per second; accepted is at least 1/{_MAX_UPSAMPLING} of "
            f"data.audio.sample_rate={sample_rate}"
        )
    if samples.size and not (whole and samples.size == len(samples) and rate == sample_rate):
        samples = _mix_and_resample(samples, name, rate, sample_rate)
    if not samples.size:
        raise DataError(f"{name}: holds no sound; accepted is at least one sample")
    return samples.astype("<i2").tobytes()


def _mix_and_resample(
    samples: NDArray[Any], name: str, rate: int, sample_rate: int
) -> NDArray[np.float64]:
    """Returns float64[N], whole numbers of 16 bits."""
    import soxr

    with np.errstate(over="ignore", invalid="ignore"):  # damaged fractions may be of any size
        mixed = samples.reshape(len(samples), -1).astype(np.float64).mean(axis=1)
        if samples.dtype.kind == "f":
            mixed *= _FULL_SCALE
        if rate != sample_rate:
            mixed = soxr.resample(mixed, rate, sample_rate, quality="VHQ")
    if not np.isfinite(mixed).all():
        raise DataError(f"{name}: has samples that are no numbers; accepted are fractions")
    return np.rint(mixed).clip(-_FULL_SCALE, _FULL_SCALE - 1)


def _wav_size(data: bytes, name: str) -> int:
    """Returns the bytes of samples that a WAV file promises, 0 if it does not say."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            found = len(data) - at - 8
            if found < size < 2**32 - 1:
                raise DataError(
                    f"{name}: cut short, {found} of {size} bytes; accepted is a whole WAV file"
                )
            return 0 if size == 2**32 - 1 else size
        at += 8 + size + size % 2
    raise DataError(f"{name}: cut short before the samples; accepted is a whole WAV file")


def _flac_frames(data: bytes) -> int:
    """Returns the samples per channel that a FLAC file promises, 0 if it does not say."""
    return int.from_bytes(data[21:26], "big") % 2**36


def _read(data: bytes, name: str) -> tuple[NDArray[Any], int, int]:
    """Returns the samples [N, channels], the rate, and the bytes per sample in the file."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.subtype not in _ENCODINGS:
                raise DataError(
                    f"{name}: is compressed ({file.subtype}); accepted is a WAV file of PCM or "
                    "floating point, or a FLAC file"
                )
            width, dtype = _ENCODINGS[file.subtype]
            return file.read(dtype=dtype, always_2d=True), file.samplerate, width
    except (RuntimeError, ValueError, MemoryError) as error:
        reason = getattr(error, "error_string", error)
        raise DataError(f"{name}: damaged ({reason}); accepted is an intact file") from None


def _md5(samples: NDArray[Any], width: int) -> bytes:
    """Returns the checksum that a FLAC file has of its samples, each of `width` bytes."""
    if samples.dtype == np.int16:
        full = samples.astype("<i2")
    else:
        full = (samples * 2**31).astype("<i4")
    octets = full.reshape(-1, 1).view(np.uint8)[:, -width:]  # libsndfile moves them to the top
    return hashlib.md5(octets.tobytes(), usedforsecurity=False).digest()


def encode(samples: bytes, sample_rate: int) -> bytes:
    """Returns the contents of a WAV file.

    Args:
        samples: SAMPLE_BYTES bytes per sample, one channel.
        sample_rate: in samples per second.
    """
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(SAMPLE_BYTES)
        file.setframerate(sample_rate)
        file.writeframes(samples)
    return data.getvalue()
