"""Sound as bytes: WAV files in and out, whose header is no part of the data.

The bytes are the samples as they stand in the file, one channel of 16-bit numbers as in the paper.
Their order, of which the paper says nothing, is that of WAV: little-endian.
"""

import io
import wave

from megabyte_jax.errors import UserError

SAMPLE_BYTES = 2


def decode(data: bytes, name: str, sample_rate: int) -> bytes:
    """Reads the samples of a WAV file.

    Args:
        data: contents of the file.
        name: what the user calls it, for the error.
        sample_rate: that it must have, in samples per second.

    Returns:
        SAMPLE_BYTES bytes per sample.

    Raises:
        UserError: it is no such file, is cut short, or has another rate, width or number of
            channels.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            found = file.getframerate(), 8 * file.getsampwidth(), file.getnchannels()
            size = file.getnframes() * file.getsampwidth() * file.getnchannels()
            samples = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError) as error:
        reason = str(error) or "cut short"
        raise UserError(f"{name}: no WAV file ({reason}); accepted is one of PCM") from None
    if found != (sample_rate, 8 * SAMPLE_BYTES, 1):
        rate, bits, channels = found
        raise UserError(
            f"{name}: has {rate} Hz, {bits} bits and {channels} channels; accepted is "
            f"data.audio.sample_rate={sample_rate} Hz, {8 * SAMPLE_BYTES} bits and 1 channel"
        )
    if len(samples) != size:
        raise UserError(
            f"{name}: cut short, {len(samples)} of {size} bytes; accepted is a whole WAV file"
        )
    return samples


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
