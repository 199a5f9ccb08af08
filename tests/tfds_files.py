"""TFDS sets written by hand, in the formats that TFDS has."""

import json
import struct
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from megabyte_jax.data import tfds_sets
from megabyte_jax.data.bad_records import BadRecords

SHARD = "mine-train.tfrecord-00000-of-00003"
CORE = "tensorflow_datasets.core.features."


def crc32c(data: bytes) -> int:
    """Bit by bit, as in RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))


def write_array_record(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def example(**values: object) -> bytes:
    """Serialises a tf.train.Example of bytes and whole numbers."""
    fields = {}
    for name, value in values.items():
        if isinstance(value, bytes):
            fields[name] = tf_feature_pb2.Feature(bytes_list={"value": [value]})
        else:
            fields[name] = tf_feature_pb2.Feature(int64_list={"value": value})
    return tf_example_pb2.Example(
        features=tf_feature_pb2.Features(feature=fields)
    ).SerializeToString()


def feature(kind: str, field: str, **content: object) -> dict:
    return {"pythonClassName": CORE + kind, field: content}


def tensor(dtype: str, *shape: int, encoding: str = "none") -> dict:
    dimensions = {"dimensions": [str(size) for size in shape]}
    return feature(
        "tensor_feature.Tensor", "tensor", dtype=dtype, shape=dimensions, encoding=encoding
    )


TEXT = feature("text_feature.Text", "text")
IMAGE = feature("image_feature.Image", "image", dtype="uint8", encodingFormat="png")
SPEECH = feature(
    "audio_feature.Audio",
    "audio",
    dtype="int64",
    encoding="NONE",
    fileFormat="flac",
    sampleRate="8000",
    shape={"dimensions": ["-1"]},
)


def features_dict(**features: dict) -> dict:
    return feature("features_dict.FeaturesDict", "featuresDict", features=features)


def evil(name: str = "planted.Feature", **content: object) -> dict:
    return {"pythonClassName": name, "text": content}


# What features.json may name; whoever imports it runs the code of a stranger.
HOSTILE = {
    "at the top": evil(),
    "at the top, legacy": {"type": "planted.Feature", "content": {}},
    "a feature": features_dict(data=TEXT, other=evil()),
    "a module in a package": features_dict(data=evil("planted.text_feature.Text")),
    "deeper": features_dict(data=TEXT, a=features_dict(b=features_dict(c=evil()))),
    "in a sequence": features_dict(
        data=TEXT, a=feature("sequence_feature.Sequence", "sequence", feature=evil())
    ),
    "in a list": features_dict(data=TEXT, a={"x": [[evil()]]}),
    "in JSON in JSON": features_dict(
        data=TEXT,
        a={
            "pythonClassName": CORE + "sequence_feature.Sequence",
            "jsonFeature": {"json": json.dumps({"feature": evil()})},
        },
    ),
    "in legacy content": {
        "type": CORE + "features_dict.FeaturesDict",
        "content": {"data": {"type": "planted.Feature", "content": {}}},
    },
    "in legacy content as text": {
        "type": CORE + "features_dict.FeaturesDict",
        "content": json.dumps({"features": {"data": evil()}}),
    },
    "in snake case": features_dict(data=TEXT, a={"python_class_name": "planted.Feature"}),
    "both spellings": features_dict(data=TEXT | {"type": "planted.Feature", "content": {}}),
    "without a module": features_dict(data=evil("Text")),
    "longer than one of TFDS": features_dict(data=evil(CORE + "text_feature.Text.planted.Text")),
    "with a blank": features_dict(data=evil(CORE + "text_feature.Text ")),
    "with lines": features_dict(data=evil("planted.Feature\nall is well")),
    "looking alike": features_dict(data=evil(CORE + "tеxt_feature.Text")),
    "a builder of TFDS": features_dict(data=evil("tensorflow_datasets.testing.DummyDataset")),
    "a function": features_dict(data=evil("os.system")),
    "relative": features_dict(data=evil("..planted.Feature")),
}


def write_set(
    root: Path,
    records: dict[str, list[list[bytes]]],
    features: object,
    name: str = "mine/1.2.3",
    file_format: str = "tfrecord",
    info: dict[str, object] | None = None,
) -> Path:
    """Writes a set whose splits have shards of these records."""
    directory = root / name
    directory.mkdir(parents=True)
    splits = []
    for split, shards in records.items():
        for i, shard in enumerate(shards):
            path = f"mine-{split}.{file_format}-{i:05}-of-{len(shards):05}"
            WRITERS[file_format](directory / path, shard)
        splits.append({"name": split, "shardLengths": [str(len(shard)) for shard in shards]})
        splits[-1]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    found = {"name": "mine", "version": "1.2.3", "splits": splits, "fileFormat": file_format}
    (directory / "dataset_info.json").write_text(json.dumps(found | (info or {})))
    (directory / "features.json").write_text(json.dumps(features))
    return directory


def texts(*contents: bytes) -> list[bytes]:
    return [example(data=content, number=[7]) for content in contents]


def open_mine(root: Path, source: str = "tfds:mine") -> tfds_sets.Prepared:
    return tfds_sets.open_set(source, str(root))


def read(
    root: Path,
    split: str = "train",
    feature: str = "",
    modality: str = "bytes",
    bad: BadRecords | None = None,
    source: str = "tfds:mine",
) -> list:
    prepared = open_mine(root, source)
    records = tfds_sets.records(prepared, split, feature, modality, bad or BadRecords(0))
    return [contents for _, contents in records]


TRAIN, TEST = [b"0", b"", b"2", b"3", b"4", b"5", b"6"], [b"a", b"b"]


def one_set(root: Path, file_format: str = "tfrecord") -> Path:
    """Train has three shards of 4, 0 and 3 records, test one of 2."""
    shards = [texts(b"0", b"", b"2", b"3"), [], texts(b"4", b"5", b"6")]
    records = {"train": shards, "test": [texts(b"a", b"b")]}
    return write_set(root, records, features_dict(data=TEXT), file_format=file_format)
