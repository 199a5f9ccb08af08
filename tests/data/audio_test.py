import io
import struct
import wave

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data import audio
from megabyte_jax.errors import UserError


def wav_by_hand(samples, rate, bits=16, channels=1):
    """A WAV file written from the definition of the format."""
    frame = bits // 8 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame, frame, bits)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(samples))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(samples)) + b"WAVE" + chunks + samples


SAMPLES = st.integers(0, 50).flatmap(lambda n: st.binary(min_size=2 * n, max_size=2 * n))


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 2**31 - 1))
def test_samples_come_back_exactly_and_without_the_header(samples, rate):
    assert audio.decode(wav_by_hand(samples, rate), "x", rate) == samples
    assert audio.encode(samples, rate) == wav_by_hand(samples, rate)


def test_chunks_around_the_samples_are_left_out():
    samples = bytes(range(6))
    data = wav_by_hand(samples, 8000)
    listed = b"LIST" + struct.pack("<I", 4) + b"INFO"
    whole = data[:36] + listed + data[36:] + listed
    whole = whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]
    assert audio.decode(whole, "x", 8000) == samples


def test_a_sample_is_two_bytes_little_endian():
    with wave.open(io.BytesIO(audio.encode(struct.pack("<3h", 1, -2, 300), 8000))) as file:
        assert (file.getnframes(), file.getsampwidth(), file.getnchannels()) == (3, 2, 1)
        assert file.readframes(3) == b"\x01\x00\xfe\xff\x2c\x01"


@pytest.mark.parametrize(
    "rate, bits, channels, named",
    [
        (44100, 16, 1, "has 44100 Hz, 16 bits and 1 channels"),
        (8000, 8, 1, "has 8000 Hz, 8 bits and 1 channels"),
        (8000, 16, 2, "has 8000 Hz, 16 bits and 2 channels"),
    ],
)
def test_another_format_is_refused_with_both(rate, bits, channels, named):
    with pytest.raises(UserError, match=f"^x: {named}; accepted is .*=8000 Hz, 16 bits and 1 "):
        audio.decode(wav_by_hand(bytes(12), rate, bits, channels), "x", 8000)


def test_a_file_cut_short_is_refused():
    data = wav_by_hand(bytes(12), 8000)
    with pytest.raises(UserError, match="^x: cut short, 9 of 12 bytes; accepted is"):
        audio.decode(data[:-3], "x", 8000)
    with pytest.raises(UserError, match="^x: no WAV file .*; accepted is"):
        audio.decode(data[:30], "x", 8000)


WAV = wav_by_hand(bytes(range(12)), 8000)


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=99),
        st.tuples(st.integers(0, len(WAV) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda change: WAV[: change[0]] + change[1] + WAV[change[0] + len(change[1]) :]
        ),
    )
)
def test_damaged_data_is_whole_samples_or_one_error(data):
    try:
        assert len(audio.decode(data, "x", 8000)) % 2 == 0
    except UserError as error:
        assert str(error).startswith("x: ") and "accepted is" in str(error)
