import io
import math
import struct
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data import audio
from megabyte_jax.errors import DataError


def wav_by_hand(samples, rate, bits=16, channels=1):
    """A WAV file written from the definition of the format."""
    frame = bits // 8 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame, frame, bits)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(samples))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(samples)) + b"WAVE" + chunks + samples


def sound_file(samples, rate, kind, subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype=subtype, format=kind)
    return file.getvalue()


SAMPLES = st.integers(1, 50).flatmap(lambda n: st.binary(min_size=2 * n, max_size=2 * n))


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 2**31 - 1))
def test_samples_come_back_exactly_and_without_the_header(samples, rate):
    assert audio.decode(wav_by_hand(samples, rate), "x", rate) == samples
    assert audio.encode(samples, rate) == wav_by_hand(samples, rate)


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 65_535))
def test_a_flac_comes_back_exactly(samples, rate):
    data = sound_file(np.frombuffer(samples, "<i2"), rate, "FLAC")
    assert audio.decode(data, "x", rate) == samples


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


def test_a_file_cut_short_is_refused():
    data = wav_by_hand(bytes(12), 8000)
    with pytest.raises(DataError, match="^x: cut short, 9 of 12 bytes; accepted is"):
        audio.decode(data[:-3], "x", 8000)
    with pytest.raises(DataError, match="^x: cut short before the samples; accepted is"):
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
    except DataError as error:
        assert str(error).startswith("x: ") and "accepted is" in str(error)


def noise(frames, channels, bits, seed=0):
    """Samples of all sizes up to the largest of `bits`, in the uppermost bits of int32."""
    values = np.random.default_rng(seed).integers(-(2**31), 2**31, (frames, channels))
    return (values >> (32 - bits) << (32 - bits)).astype(np.int32)


def rounded(samples):
    """What samples of full scale 1 are in 16 bits: averaged, rounded and clipped."""
    values = [math.fsum(frame) / len(frame) * 2**15 for frame in samples.tolist()]
    return struct.pack(
        f"<{len(values)}h", *(max(-(2**15), min(2**15 - 1, round(v))) for v in values)
    )


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(
    "kind, subtype, bits",
    [
        ("FLAC", "PCM_S8", 8),
        ("FLAC", "PCM_16", 16),
        ("FLAC", "PCM_24", 24),
        ("WAV", "PCM_U8", 8),
        ("WAV", "PCM_16", 16),
        ("WAV", "PCM_24", 24),
        ("WAV", "PCM_32", 32),
        ("WAVEX", "PCM_16", 16),
        ("WAVEX", "PCM_24", 24),
    ],
)
def test_channels_are_averaged_and_widths_become_sixteen_bits(kind, subtype, bits, channels):
    samples = noise(301, channels, bits)
    data = sound_file(samples, 8000, kind, subtype)
    assert audio.decode(data, "x", 8000) == rounded(samples / 2**31)


@pytest.mark.parametrize("subtype, dtype", [("FLOAT", np.float32), ("DOUBLE", np.float64)])
def test_fractions_are_rounded_and_clipped(subtype, dtype):
    samples = np.random.default_rng(0).uniform(-1.5, 1.5, (301, 2)).astype(dtype)
    data = sound_file(samples, 8000, "WAV", subtype)
    expected = rounded(samples.astype(np.float64))
    assert audio.decode(data, "x", 8000) == expected
    assert struct.pack("<h", -(2**15)) in expected and struct.pack("<h", 2**15 - 1) in expected


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "int32", "int64", "float32", ">f8"])
@pytest.mark.parametrize("shape", [(99,), (99, 1)])
def test_an_array_of_any_type_is_the_same_samples(dtype, shape):
    samples = np.random.default_rng(1).integers(-(2**15), 2**15, shape)
    array = samples.astype(dtype) / (2**15 if "f" in dtype else 1)
    array = array.astype(dtype)
    assert audio.convert(array, "x", 8000, 8000) == samples.astype("<i2").tobytes()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("tone", [100, 440, 3000])
def test_a_tone_keeps_its_pitch_and_its_loudness_at_another_rate(rate, tone):
    time = np.arange(rate) / rate
    data = sound_file(np.sin(2 * np.pi * tone * time) / 2, rate, "WAV", "FLOAT")
    made = np.frombuffer(audio.decode(data, "x", 16000), "<i2")
    assert len(made) == 16000
    inside = slice(2000, -2000)  # a tone has no beginning and no end
    expected = np.sin(2 * np.pi * tone * np.arange(16000) / 16000) * 2**14
    assert np.abs(made - expected)[inside].max() <= 2


@pytest.mark.parametrize("tone", [8200, 11000, 15900])
def test_a_tone_too_high_for_the_rate_is_removed_and_not_folded_down(tone):
    time = np.arange(48000) / 48000
    made = audio.convert(np.sin(2 * np.pi * tone * time) / 2, "x", 48000, 16000)
    assert np.abs(np.frombuffer(made, "<i2"))[2000:-2000].max() <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.integers(4000, 96000), st.integers(4000, 96000))
def test_a_sound_keeps_its_length(frames, rate, sample_rate):
    expected = frames * sample_rate / rate
    if expected < 0.5:
        return
    made = audio.convert(np.zeros(frames, np.int16), "x", rate, sample_rate)
    assert abs(len(made) / 2 - expected) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "array, rate, named",
    [
        (np.zeros(0, np.int16), 8000, "holds no sound"),
        (np.zeros((0, 2)), 8000, "holds no sound"),
        (np.zeros(1, np.int16), 48000, "holds no sound"),
        (np.zeros((4, 2, 2)), 8000, r"is float64\[4, 2, 2\]"),
        (np.zeros(4, np.uint8), 8000, r"is uint8\[4\]"),
        (np.zeros(4, complex), 8000, r"is complex128\[4\]"),
        (np.array([0, 2**15]), 8000, "has numbers of more than 16 bits"),
        (np.array([0, -(2**15) - 1]), 8000, "has numbers of more than 16 bits"),
        (np.array([0, np.nan]), 8000, "has samples that are no numbers"),
        (np.array([0, np.inf, 0]), 16000, "has samples that are no numbers"),
        (np.array([[1e308, 1e308]]), 8000, "has samples that are no numbers"),
        (np.zeros(4), 79, "has 79 samples per second"),
        (np.zeros(4), 0, "has 0 samples per second"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_an_array_that_is_no_sound_is_refused(array, rate, named):
    with pytest.raises(DataError, match=f"^record 7: {named}.*; accepted "):
        audio.convert(array, "record 7", rate, 8000)


def tune():
    walk = np.random.default_rng(0).normal(size=2500).cumsum() * 50
    return walk.astype("<i2")


WHOLE = {
    "wav": sound_file(tune(), 8000, "WAV") + b"LIST" + struct.pack("<I", 4) + b"INFO",
    "flac": sound_file(tune(), 8000, "FLAC"),
    "deep flac": sound_file(noise(500, 2, 24) >> 3, 8000, "FLAC", "PCM_24"),
    "deep wav": sound_file(noise(500, 2, 24), 8000, "WAV", "PCM_24"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_anywhere_is_refused_or_whole(kind):
    whole = audio.decode(WHOLE[kind], "x", 8000)
    refused = 0
    for size in range(len(WHOLE[kind])):
        try:
            assert audio.decode(WHOLE[kind][:size], "x", 8000) == whole, size
        except DataError as error:
            assert str(error).startswith("x: ") and "accepted is" in str(error)
            refused += 1
    assert refused == len(WHOLE[kind]) - (12 if kind == "wav" else 0)  # of the list at the end


RATE_OF_A_FLAC = range(18, 21)  # which no checksum covers


@pytest.mark.parametrize("kind", ["flac", "deep flac"])
def test_a_flac_with_a_flipped_bit_is_refused_or_whole(kind):
    data = WHOLE[kind]
    whole = audio.decode(data, "x", 8000)
    for place in set(range(len(data))) - set(RATE_OF_A_FLAC):
        flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        try:
            assert audio.decode(flipped, "x", 8000) == whole, place
        except DataError:
            pass


def test_a_flac_without_a_checksum_of_its_samples_is_read():
    data = WHOLE["flac"]
    assert audio.decode(data[:26] + bytes(16) + data[42:], "x", 8000) == tune().tobytes()


def test_a_file_whose_header_gives_no_length_is_refused():
    wav, flac = WHOLE["wav"], WHOLE["flac"]
    for data in (
        wav[:40] + bytes(4) + wav[44:],
        wav[:40] + b"\xff" * 4 + wav[44:],
        flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:],
        wav_by_hand(b"", 8000),
    ):
        with pytest.raises(DataError, match="^x: holds no sound or its header does not say how mu"):
            audio.decode(data, "x", 8000)


@pytest.mark.parametrize("size", [0, 2**32 - 1])
def test_the_size_of_everything_in_a_wav_may_be_unknown(size):
    data = WHOLE["wav"]
    data = data[:4] + struct.pack("<I", size) + data[8:]
    assert audio.decode(data, "x", 8000) == tune().tobytes()


def test_half_a_sample_is_damage():
    with pytest.raises(DataError, match="^x: damaged, its samples and its header differ; accepted"):
        audio.decode(wav_by_hand(bytes(7), 8000), "x", 8000)


@pytest.mark.parametrize("kind", ["OGG", "MP3", "AIFF", "W64", "RF64", "CAF"])
def test_other_files_are_refused(kind):
    with pytest.raises(DataError, match="^x: no WAV or FLAC file; accepted is one of these$"):
        audio.decode(sound_file(tune(), 8000, kind), "x", 8000)


@pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_a_compressed_wav_is_refused(subtype):
    with pytest.raises(DataError, match=rf"^x: is compressed \({subtype}\); accepted is"):
        audio.decode(sound_file(tune(), 8000, "WAV", subtype), "x", 8000)


@pytest.mark.parametrize("channels", [1, 8])
def test_a_flac_file_of_hours_of_silence_is_refused_before_it_is_decoded(channels):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((100, channels), np.int16), 16_000, "PCM_16", format="FLAC")
    data = bytearray(file.getvalue())
    frames = (2**24 + 16 * len(data)) // channels + 1
    data[21:26] = ((data[21] >> 4 << 36) + frames).to_bytes(5, "big")
    with pytest.raises(DataError, match=f"^x: promises {frames:,} samples .*; accepted is at most"):
        audio.decode(bytes(data), "x", 16_000)
