"""Shards with every kind of damage."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.errors import DataError
from tests.tfds_files import (
    TEXT,
    TRAIN,
    WRITERS,
    features_dict,
    masked,
    one_set,
    read,
    texts,
    write_set,
)


@pytest.mark.parametrize("file_format", WRITERS)
def test_a_damaged_record_is_named_and_the_others_are_read(
    tmp_path: Path, file_format: str
) -> None:
    contents = np.random.default_rng(0).integers(0, 256, (5, 30_000), np.uint8)
    contents = [content.tobytes() for content in contents]  # that ArrayRecord cannot compress
    records = {"train": [texts(*contents)]}
    directory = write_set(tmp_path, records, features_dict(data=TEXT), file_format=file_format)
    shard = next(directory.glob("*train*"))
    whole = bytearray(shard.read_bytes())
    whole[whole.index(contents[2][10_000:10_020])] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(DataError, match=f"{shard.name}, record 2: damaged"):
        read(tmp_path)
    bad = BadRecords(1)
    assert read(tmp_path, bad=bad) == contents[:2] + contents[3:] and bad.count == 1


def test_a_tfrecord_file_cut_anywhere_loses_what_is_behind_the_cut(tmp_path: Path) -> None:
    contents = [b"first", b"", b"third"]
    directory = write_set(tmp_path, {"train": [texts(*contents)]}, features_dict(data=TEXT))
    shard = next(directory.glob("*train*"))
    whole = shard.read_bytes()
    sizes = [16 + len(record) for record in texts(*contents)]
    for cut in range(len(whole)):
        shard.write_bytes(whole[:cut])
        bad, kept = BadRecords(9), int(np.searchsorted(np.cumsum(sizes), cut, side="right"))
        assert read(tmp_path, bad=bad) == contents[:kept]
        assert bad.count == 3 - kept and f"record {kept}" in bad.first


def test_no_flipped_bit_of_a_tfrecord_file_goes_unnoticed(tmp_path: Path) -> None:
    contents = [b"first", b"", b"third"]
    directory = write_set(tmp_path, {"train": [texts(*contents)]}, features_dict(data=TEXT))
    shard = next(directory.glob("*train*"))
    whole = shard.read_bytes()
    for at in range(len(whole)):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        bad = BadRecords(9)
        assert set(read(tmp_path, bad=bad)) < set(contents) and bad.count


@pytest.mark.parametrize("file_format", WRITERS)
def test_the_records_of_a_missing_shard_are_bad_ones(tmp_path: Path, file_format: str) -> None:
    directory = one_set(tmp_path, file_format)
    next(directory.glob("*train*-00002-of-*")).unlink()
    bad = BadRecords(3)
    assert read(tmp_path, bad=bad) == TRAIN[:4] and bad.count == 3
    assert "00002-of-00003, record 0: damaged (No such file" in bad.first


@pytest.mark.parametrize("file_format", WRITERS)
def test_a_shard_with_fewer_records_than_it_should_have_is_noticed(
    tmp_path: Path, file_format: str
) -> None:
    directory = one_set(tmp_path, file_format)
    WRITERS[file_format](next(directory.glob("*test*")), texts(b"a"))
    with pytest.raises(DataError, match="mine-test.*record 1: damaged"):
        read(tmp_path, "test")


def test_a_length_of_exabytes_reserves_nothing(tmp_path: Path) -> None:
    directory = one_set(tmp_path)
    length = struct.pack("<Q", 1 << 60)
    next(directory.glob("*test*")).write_bytes(length + masked(length) + b"x" * 50)
    with pytest.raises(DataError, match="record 0: damaged .cut short"):
        read(tmp_path, "test")
