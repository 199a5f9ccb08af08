"""What the examples of a TFDS set hold, taken from its features.json without TFDS.

TFDS imports the modules of the classes that this file names, so that a set from elsewhere could run
code. Here the names are only compared with those that are known.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_jax import foreign
from megabyte_jax.errors import DataError, UserError

_MAX_JSON = 1 << 26  # bytes; the largest ones in the catalogue have a few megabytes

# What code that expects JSON of one shape runs into in JSON of another.
MALFORMED = LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError

_CLASSES = frozenset(
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "audio_feature.Audio",
        "bounding_boxes.BBoxFeature",
        "class_label_feature.ClassLabel",
        "dataset_feature.Dataset",
        "feature.Tensor",
        "features_dict.FeaturesDict",
        "image_feature.Image",
        "labeled_image.LabeledImage",
        "scalar.Scalar",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
        "translation_feature.Translation",
        "translation_feature.TranslationVariableLanguages",
        "video_feature.Video",
    )
)
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64")
_ENCODINGS = ("none", "bytes", "zlib")


@dataclass(frozen=True, slots=True)
class Feature:
    """One value of every example.

    Attributes:
        name: what it is called.
        kind: Text, Image, Audio or Tensor.
        shape: of the array, -1 where examples differ; () of bytes.
        dtype: of the array's elements; "string" of bytes.
        encoding: none, bytes or zlib.
        sample_rate: of Audio, in samples per second; None if it is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str = "none"
    sample_rate: int | None = None

    def suits(self, modality: str) -> bool:
        """Returns whether the value is of a modality: bytes, image or audio."""
        match modality:
            case "image":
                return self.kind == "Image" or self.dtype == "uint8" and len(self.shape) == 3
            case "audio":
                sound = self.dtype in ("int16", "float32") and len(self.shape) in (1, 2)
                return self.kind == "Audio" or self.kind == "Tensor" and sound
        return self.kind in ("Text", "Tensor") and self.dtype in ("string", "uint8")

    def decoder(self) -> Callable[[bytes], bytes | NDArray[Any]]:
        """Returns what makes of a serialised example the value, bytes or an array of `shape`.

        What it raises of a damaged example may be anything.
        """
        import tensorflow_datasets as tfds

        tensor = tfds.features.Tensor(
            shape=tuple(None if size < 0 else size for size in self.shape),
            dtype=np.object_ if self.dtype == "string" else np.dtype(self.dtype),
            encoding=self.encoding,
        )
        features = tfds.features.FeaturesDict({self.name: tensor})

        def decode(record: bytes) -> bytes | NDArray[Any]:
            value = features.deserialize_example_np(record)[self.name]
            if value is None:
                raise ValueError(f"has no {self.name}")
            return value

        return decode


def choose(features: list[Feature], name: str, modality: str, source: str) -> Feature:
    """Returns the feature that holds the data.

    Args:
        features: those of the set.
        name: data.tfds.feature; "" is the one called `data`, else the only one that suits.
        modality: bytes, image or audio.
        source: the set, for the error.

    Raises:
        UserError: there is none, or several; the candidates are named.
    """
    candidates = {feature.name: feature for feature in features if feature.suits(modality)}
    if name in candidates:
        return candidates[name]
    if not name and "data" in candidates:
        return candidates["data"]
    if not name and len(candidates) == 1:
        return next(iter(candidates.values()))
    if candidates:
        accepted = f"one of {', '.join(sorted(candidates))}"
    else:
        others = ", ".join(f"{feature.name} ({feature.kind})" for feature in features)
        accepted = f"another data.modality than {modality}, of which it has nothing among {others}"
    raise UserError(f"data.tfds.feature={name!r}: of {source} accepted is {accepted}")


def read_features(directory: Path) -> list[Feature]:
    """Reads the features of a set that this package can read.

    Raises:
        DataError: features.json is missing, damaged, or names a class that is none of TFDS's own.
    """
    path = directory / "features.json"
    content = read_json(path, directory)
    try:
        for name in _class_names(content):
            if name not in _CLASSES:
                raise DataError(
                    f"{path}: names the class {name[:100]!a}, which is none of TFDS's own features "
                    "and is never imported; accepted are sets made of those"
                )
        fields = _fields(content).items()
        return [feature for name, value in fields for feature in _read_feature(name, value)]
    except MALFORMED as error:
        raise DataError(f"{path}: damaged ({error!r}); accepted is what TFDS wrote") from error


def read_json(path: Path, directory: Path) -> dict[str, Any]:
    """Reads a JSON file of a set, which may come from anyone.

    Raises:
        DataError: it is missing, too large, no JSON, or not to be trusted; see `check_file`.
    """
    check_file(path, directory)
    try:
        return foreign.read_json(path, directory, _MAX_JSON)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: unusable ({error}); accepted is a JSON object in at most {_MAX_JSON} bytes"
        ) from error


def check_file(path: Path, directory: Path) -> int:
    """Returns the size of a file of a set in bytes.

    Raises:
        DataError: it is missing, no regular file, or links lead out of the directory.
    """
    try:
        return foreign.check_file(path, directory)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; accepted is a file of the data set") from error


def _class_names(content: Any) -> Iterator[str]:
    """Yields every class that TFDS would import, those in JSON inside of JSON too."""
    if isinstance(content, list):
        for value in content:
            yield from _class_names(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key in _CLASS_KEYS and isinstance(value, str):
                yield value
            elif key in ("json", "content") and isinstance(value, str):
                yield from _class_names(json.loads(value))
            else:
                yield from _class_names(value)


def _fields(content: Any) -> Any:
    """Returns name to feature, of either form in which TFDS wrote FeaturesDict."""
    if "type" in content:
        return _content(content).get("features", _content(content))
    return content["featuresDict"]["features"]


def _content(feature: Mapping[str, Any]) -> Any:
    if "type" not in feature:
        return next((value for value in feature.values() if isinstance(value, dict)), {})
    content = feature["content"]
    return json.loads(content) if isinstance(content, str) else content


def _read_feature(name: str, feature: Mapping[str, Any]) -> list[Feature]:
    """Returns the feature, in a list that is empty if it can hold no data."""
    kind = feature.get("type") or feature["pythonClassName"]
    kind, content = kind.rpartition(".")[2], _content(feature)
    if kind in ("Text", "Image"):
        return [Feature(name, kind, (), "string")]
    if kind not in ("Tensor", "Scalar", "Audio"):
        return []
    shape = content.get("shape") or []
    if isinstance(shape, dict):
        shape = shape.get("dimensions", [])
    sizes = tuple(-1 if size is None else int(size) for size in shape)
    dtype = content["dtype"]
    encoding = (content.get("encoding") or "none").lower()
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding {encoding}")
    if kind == "Audio":
        rate = int(content.get("sampleRate") or content.get("sample_rate") or 0) or None
        if content.get("lazyDecode") or content.get("lazy_decode"):  # stored as the file it was
            return [Feature(name, kind, (), "string", sample_rate=rate)]
        return [Feature(name, kind, sizes, dtype, encoding, rate)] if dtype in _DTYPES else []
    if dtype in _DTYPES and sizes or (dtype, sizes, encoding) == ("string", (), "none"):
        return [Feature(name, "Tensor", sizes, dtype, encoding)]
    return []
