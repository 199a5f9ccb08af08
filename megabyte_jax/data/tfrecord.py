"""The records of one shard of a TFDS set, read without TensorFlow and held to their checksums."""

import os
import struct
from collections.abc import Iterator

from megabyte_jax.errors import DataError


def read_shard(path: str, file_format: str, skip: int, take: int) -> Iterator[bytes | DataError]:
    """Reads records of a shard in order.

    Args:
        path: of the shard.
        file_format: a key of `READERS`.
        skip: records that are passed over.
        take: records that are read after them.

    Yields:
        `take` times a record, or what is wrong with it. Of a TFRecord file that is cut short, or in
        which the length of a record is damaged, all records from there on are lost.
    """
    done, reason = 0, "the file ends before it"
    try:
        for record in READERS[file_format](path, skip, take):
            yield record if isinstance(record, bytes) else _damaged(path, skip + done, record)
            done += 1
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    for number in range(skip + done, skip + take):
        yield _damaged(path, number, reason)


def _damaged(path: str, number: int, reason: object) -> DataError:
    line = " ".join(str(reason).split())
    return DataError(f"{path}, record {number}: damaged ({line}); accepted is an intact record")


def _read_array_record(path: str, skip: int, take: int) -> Iterator[bytes | Exception]:
    from array_record.python.array_record_module import ArrayRecordReader

    with open(path, "rb"):  # the reader says of a file it cannot open only that it is corrupt
        reader = ArrayRecordReader(path, "readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
    for number in range(skip, skip + take):
        try:
            yield reader.read([number])[0]
        except RuntimeError as error:  # it checks each record, and goes on after a bad one
            yield error
    # It is not closed: that of a damaged file would raise, and it goes when nothing holds it.


def _read_tfrecord(path: str, skip: int, take: int) -> Iterator[bytes | Exception]:
    """A record is its length as uint64, checksum, contents, checksum; all little-endian."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        for number in range(skip + take):
            header = file.read(12)
            if len(header) < 12:
                raise ValueError("cut short")
            length, checksum = struct.unpack("<QI", header)
            if checksum != _checksum(header[:8]):
                raise ValueError("the checksum of a length differs, its own or of one before it")
            if file.tell() + length + 4 > size:
                raise ValueError("cut short")
            if number < skip:
                file.seek(length + 4, os.SEEK_CUR)
                continue
            record = file.read(length)
            intact = file.read(4) == struct.pack("<I", _checksum(record))
            yield record if intact else ValueError("its checksum differs")


def _checksum(data: bytes) -> int:
    """TFRecord's masked CRC-32C: rotated and moved, so that no data is its own checksum's input."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


READERS = {"array_record": _read_array_record, "tfrecord": _read_tfrecord}
