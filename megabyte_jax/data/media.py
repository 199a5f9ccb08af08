"""Files of the run's modality as the bytes that the model reads, and back."""

from typing import Any

from numpy.typing import NDArray

from megabyte_jax.data import audio, images
from megabyte_jax.errors import DataError

SUFFIXES = {"bytes": ".txt", "image": ".png", "audio": ".wav"}


def unit(data: Any) -> int:
    """Returns the bytes of the config's image or of one sample of its sound; of any bytes 1."""
    image = data.image.height * data.image.width * 3
    return {"bytes": 1, "image": image, "audio": audio.SAMPLE_BYTES}[data.modality]


def from_file(contents: bytes, name: str, data: Any, patch_size: int) -> bytes:
    """Returns what the model reads of a file.

    Args:
        contents: of a PNG or JPEG, a WAV or FLAC; of modality bytes they are what is read.
        name: what the user calls the file, for the error.
        data: the config's, with modality, image and audio.
        patch_size: P in bytes.

    Returns:
        At least one byte; of modality image a whole image, of audio whole samples.

    Raises:
        DataError: the file is empty, damaged or none of the modality.
    """
    if not contents:
        raise DataError(f"{name}: holds no byte; accepted is a file that is not empty")
    match data.modality:
        case "image":
            image = data.image
            pixels = images.decode(contents, name, image.height, image.width, image.resize)
            return images.to_bytes(pixels, image.scan, patch_size)
        case "audio":
            return audio.decode(contents, name, data.audio.sample_rate)
    return contents


def from_array(
    array: NDArray[Any], name: str, data: Any, patch_size: int, rate: int | None = None
) -> bytes:
    """Returns what the model reads of an array out of a data set.

    Args:
        array: an image, see `images.fit`, or sound, see `audio.convert`; of modality bytes uint8 of
            any shape, read in C order.
        name: what the user calls the record, for the error.
        data: the config's, with modality, image and audio.
        patch_size: P in bytes.
        rate: of sound, in samples per second; None takes it to be data.audio.sample_rate.

    Returns:
        At least one byte; of modality image a whole image, of audio whole samples.

    Raises:
        DataError: the array is empty or none of the modality.
    """
    if not array.size:
        raise DataError(f"{name}: holds no byte; accepted is a record that is not empty")
    match data.modality:
        case "image":
            image = data.image
            pixels = images.fit(array, name, image.height, image.width, image.resize)
            return images.to_bytes(pixels, image.scan, patch_size)
        case "audio":
            sample_rate = data.audio.sample_rate
            return audio.convert(array, name, rate or sample_rate, sample_rate)
    if array.dtype != "uint8":
        raise DataError(f"{name}: is {array.dtype}{list(array.shape)}; accepted is uint8")
    return array.tobytes()


def encode(contents: bytes, data: Any, patch_size: int) -> bytes:
    """Returns the contents of a file whose name ends in `SUFFIXES[data.modality]`.

    Args:
        contents: of modality bytes they are the file. Of an image what is missing is black, and
            what follows it is left out; of sound half a sample at the end is left out.
        data: the config's, with modality, image and audio.
        patch_size: P in bytes.
    """
    match data.modality:
        case "image":
            size = unit(data)
            whole = contents[:size].ljust(size, b"\0")
            pixels = images.to_pixels(
                whole, data.image.height, data.image.width, data.image.scan, patch_size
            )
            return images.encode(pixels)
        case "audio":
            samples = contents[: len(contents) // audio.SAMPLE_BYTES * audio.SAMPLE_BYTES]
            return audio.encode(samples, data.audio.sample_rate)
    return contents
