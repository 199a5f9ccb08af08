"""Images as bytes: the two scans of the paper, raster and patch, and files in and out.

Letters: H height and W width in pixels, P bytes of a patch, p side of a square block in pixels.
"""

import io
import math
import threading
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_jax.errors import DataError, UserError

RESIZE = ("none", "box", "bilinear", "hamming", "bicubic", "lanczos", "nearest")

_PNG_BIT_DEPTH = 24  # where a PNG file has its bits per channel
_WARNINGS = threading.Lock()  # whether they are shown is a setting of the process, not the thread


def block_side(scan: str, patch_size: int) -> int:
    """Returns the side p of the blocks of pixels that a scan goes through one after another.

    Args:
        scan: `raster`, whose blocks are single pixels, or `patch`, whose blocks p x p x 3 fill a
            patch each.
        patch_size: P in bytes.

    Raises:
        UserError: the scan is `patch` and no p has 3 p^2 = P.
    """
    if scan == "raster":
        return 1
    side = math.isqrt(patch_size // 3)
    if 3 * side**2 != patch_size:
        raise UserError(
            f"model.patch_size={patch_size}: accepted is 3 times a square, such as 12, 48, 192 or "
            "768, or data.image.scan=raster"
        )
    return side


def to_bytes(pixels: NDArray[np.uint8], scan: str, patch_size: int) -> bytes:
    """Writes the pixels in the order of a scan.

    Blocks follow one another in raster order, pixels within a block too, and the three bytes of a
    pixel stay together. The first rows, as far as p divides them, are the first bytes.

    Args:
        pixels: uint8[H, W, 3], red, green and blue; p divides H and W.
        scan: `raster` or `patch`, see `block_side`.
        patch_size: P in bytes.

    Returns:
        H * W * 3 bytes.

    Raises:
        UserError: the scan does not go with P.
    """
    H, W, _ = pixels.shape
    p = block_side(scan, patch_size)
    blocks = pixels.reshape(H // p, p, W // p, p, 3).swapaxes(1, 2)  # [H/p, W/p, p, p, 3]
    return blocks.tobytes()


def to_pixels(
    data: bytes, height: int, width: int, scan: str, patch_size: int
) -> NDArray[np.uint8]:
    """Undoes `to_bytes`.

    Args:
        data: height * width * 3 bytes.
        height: H in pixels, which p divides.
        width: W in pixels, which p divides.
        scan: `raster` or `patch`, see `block_side`.
        patch_size: P in bytes.

    Returns:
        uint8[H, W, 3].

    Raises:
        UserError: the scan does not go with P.
    """
    p = block_side(scan, patch_size)
    blocks = np.frombuffer(data, np.uint8).reshape(height // p, width // p, p, p, 3)
    return blocks.swapaxes(1, 2).reshape(height, width, 3)


def decode(
    data: bytes, name: str, height: int, width: int, resize: str = "none"
) -> NDArray[np.uint8]:
    """Reads a PNG or JPEG file.

    A PNG is held to its checksums. A JPEG has none, and only that it is cut short is always seen.

    Args:
        data: contents of the file.
        name: what the user calls it, for the error.
        height: H in pixels, see `fit`.
        width: W in pixels.
        resize: one of RESIZE.

    Returns:
        uint8[H, W, 3], of the colours of the file, and as they lie in it, whatever rotation a
        camera noted; grey has three equal channels.

    Raises:
        DataError: it is no such file, is damaged, or has another size and may not be resized, too
            many pixels, transparency, more than 8 bits per channel or CMYK colours.
    """
    from PIL import Image  # not above: eval.py and text need none of it

    try:
        image = _open(data)
        if image.format == "PNG":
            image.verify()  # decoding would not look at the checksums; it needs a fresh start
            image = _open(data)
        image.load()
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}; accepted is a smaller image") from None
    except Exception:  # Pillow's decoders raise whatever damaged data makes them run into
        raise DataError(f"{name}: no image or a damaged one; accepted is a PNG or JPEG") from None
    plain = image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data
    # Of more than 8 bits Pillow would keep 8 without a word.
    if not plain or (image.format == "PNG" and data[_PNG_BIT_DEPTH] > 8):
        raise DataError(
            f"{name}: has the colours {image.mode}; accepted is RGB, grey or a palette, of 8 bits "
            "and without transparency"
        )
    return fit(np.asarray(image.convert("RGB")), name, height, width, resize)


def _open(data: bytes) -> Any:
    from PIL import Image

    # What Pillow warns of (damaged notes of a camera) does not change the pixels.
    with _WARNINGS, warnings.catch_warnings(action="ignore"):
        return Image.open(io.BytesIO(data), formats=["PNG", "JPEG"])


def fit(pixels: NDArray[Any], name: str, height: int, width: int, resize: str) -> NDArray[np.uint8]:
    """Brings an image to a size.

    It is cropped around its centre to the largest part, of whole pixels, that has the shape of
    H x W (of an odd rest the larger half goes at the bottom and on the right), which is then
    resized. An image of the size H x W stays as it is.

    Args:
        pixels: uint8[H0, W0, C], C = 3 or 1 for grey.
        name: what the user calls it, for the error.
        height: H in pixels.
        width: W in pixels.
        resize: one of RESIZE, a filter of Pillow's; of `none` H0 x W0 must be H x W.

    Returns:
        uint8[H, W, 3].

    Raises:
        DataError: it is no such array, or has another size and may not be resized.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise DataError(
            f"{name}: is {pixels.dtype}{list(pixels.shape)}; accepted is uint8[height, width, 3 or "
            "1], an RGB or grey image"
        )
    H0, W0, _ = pixels.shape
    fits = (H0, W0) == (height, width)
    if not (fits or (resize != "none" and pixels.size)):
        raise DataError(
            f"{name}: has {H0} x {W0} pixels (height x width); accepted is any size where "
            "data.image.resize names a filter, or data.image.height x data.image.width = "
            f"{height} x {width}"
        )
    colours = np.broadcast_to(pixels, (H0, W0, 3))
    return colours if fits else _crop_and_resize(colours, height, width, resize)


def _crop_and_resize(
    pixels: NDArray[np.uint8], height: int, width: int, resize: str
) -> NDArray[np.uint8]:
    from PIL import Image

    H0, W0, _ = pixels.shape
    h = min(H0, max(1, round(W0 * height / width)))
    w = min(W0, max(1, round(H0 * width / height)))
    top, left = (H0 - h) // 2, (W0 - w) // 2
    image = Image.fromarray(pixels[top : top + h, left : left + w])
    return np.asarray(image.resize((width, height), Image.Resampling[resize.upper()]))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Returns the contents of a PNG file with these pixels, uint8[H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
