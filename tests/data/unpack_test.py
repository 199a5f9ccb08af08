import gzip
import io
import lzma
import zlib

import pytest
import zstandard

from megabyte_jax.data import unpack as unpacking
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.unpack import unpack
from megabyte_jax.errors import DataError, UserError


class Full(io.BytesIO):
    """A file on a disk with room for ten bytes."""

    def write(self, data):
        if self.tell() + len(data) > 10:
            raise OSError(28, "No space left on device")
        return super().write(data)


def files(folder, **contents):
    for name, data in contents.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return [str(folder / name.replace("_", ".")) for name in contents]


def test_files_follow_one_another_and_bad_ones_are_counted(tmp_path):
    paths = files(
        tmp_path,
        a_gz=gzip.compress(b"one"),
        b_xz=lzma.compress(b"three" * 9)[:-20],
        c_zst=zstandard.compress(b"two" * 999),
        d_gz=gzip.compress(b""),
        e_xz=lzma.compress(b"end"),
    )
    bad, unpacked = BadRecords(2), io.BytesIO()
    spans = unpack(paths, unpacked, bad)
    whole = unpacked.getvalue()
    found = {path[-4:].lstrip("/"): whole[start:stop] for path, (start, stop) in spans.items()}
    assert found == {"a.gz": b"one", ".zst": b"two" * 999, "e.xz": b"end"}
    assert bad.count == 2 and bad.first.startswith(f"{paths[1]}: cannot be unpacked")
    with pytest.raises(DataError, match=f"^{paths[3]}: holds no byte; .*max_bad_records=1 would"):
        unpack(paths, io.BytesIO(), BadRecords(1))


def test_a_full_disk_is_no_bad_record_but_a_mistake_to_be_mended(tmp_path):
    paths = files(tmp_path, a_gz=gzip.compress(b"12345"), b_gz=gzip.compress(b"1234567"))
    with pytest.raises(UserError, match="^TMPDIR=.*: No space left on device while .*/b.gz; acc"):
        unpack(paths, Full(), BadRecords(9))


BOMBS = {
    "gz": gzip.compress(bytes(2**22)),
    "xz": lzma.compress(bytes(2**22)),
    "zst": zstandard.compress(bytes(2**22)),
}


@pytest.mark.parametrize("suffix", BOMBS)
def test_a_file_that_holds_too_much_for_its_size_is_bad_and_takes_no_room(
    tmp_path, monkeypatch, suffix
):
    monkeypatch.setattr(unpacking, "_ALWAYS", 2**20)
    paths = files(tmp_path, **{f"a_{suffix}": BOMBS[suffix], "b_gz": gzip.compress(b"whole")})
    bad, unpacked = BadRecords(1), io.BytesIO()
    assert unpack(paths, unpacked, bad) == {paths[1]: (0, 5)} and unpacked.getvalue() == b"whole"
    assert bad.first == f"{paths[0]}: cannot be unpacked (holds more than 200 times its size)"


def test_a_header_of_xz_that_asks_for_gigabytes_is_bad(tmp_path):
    data = bytearray(lzma.compress(b"x"))
    # The header of a block: its size, flags, the filter, its size, and the dictionary's as 2^(n/2).
    assert data[14:16] == bytes([lzma.FILTER_LZMA2, 1])
    data[16] = 38
    data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
    with pytest.raises(DataError, match="Memory usage limit exceeded"):
        unpack(files(tmp_path, a_xz=bytes(data)), io.BytesIO(), BadRecords(0))


def test_zeros_between_the_frames_of_xz_are_padding(tmp_path):
    data = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4096)
    unpacked = io.BytesIO()
    unpack(files(tmp_path, a_xz=data), unpacked, BadRecords(0))
    assert unpacked.getvalue() == b"onetwo"
