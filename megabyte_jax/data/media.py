"""Bytes as a file of the run's modality, which other programs can open."""

from typing import Any

from megabyte_jax.data import audio, images

SUFFIXES = {"bytes": ".txt", "image": ".png", "audio": ".wav"}


def unit(data: Any) -> int:
    """Returns the bytes of the config's image or of one sample of its sound; of any bytes 1."""
    image = data.image.height * data.image.width * 3
    return {"bytes": 1, "image": image, "audio": audio.SAMPLE_BYTES}[data.modality]


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
