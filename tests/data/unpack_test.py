import gzip
import io
import lzma

import pytest
import zstandard

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
