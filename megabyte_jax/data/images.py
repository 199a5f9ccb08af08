"""Images as bytes: the two scans of the paper, raster and patch, and files in and out.

Letters: H height and W width in pixels, P bytes of a patch, p side of a square block in pixels.
"""

import io
import math
import warnings

import numpy as np
from numpy.typing import NDArray

from megabyte_jax.errors import UserError

_PNG_BIT_DEPTH = 24  # where a PNG file has its bits per channel


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


def decode(data: bytes, name: str, height: int, width: int) -> NDArray[np.uint8]:
    """Reads a PNG or JPEG file of one size.

    Args:
        data: contents of the file.
        name: what the user calls it, for the error.
        height: H that it must have, in pixels.
        width: W that it must have, in pixels.

    Returns:
        uint8[H, W, 3], exactly the colours of the file, and as they lie in it, whatever rotation a
        camera noted; grey has three equal channels.

    Raises:
        UserError: it is no such file, is damaged, or has another size, transparency or more than
            8 bits per channel.
    """
    from PIL import Image  # not above: eval.py and text need none of it

    try:
        # What Pillow warns of (damaged extras of a PNG) does not change the pixels.
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=["PNG", "JPEG"])
            fits = image.size == (width, height)
            # Of more, Pillow would keep 8 bits without a word.
            shallow = image.format != "PNG" or data[_PNG_BIT_DEPTH] <= 8
            if fits:  # else it may be far too large to decode
                image.load()
    except Exception:  # Pillow's decoders raise whatever damaged data makes them run into
        raise UserError(f"{name}: no image or a damaged one; accepted is a PNG or JPEG") from None
    if not fits:
        raise UserError(
            f"{name}: has {image.height} x {image.width} pixels (height x width); accepted is "
            f"data.image.height x data.image.width = {height} x {width}"
        )
    plain = image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data
    if not (plain and shallow):
        raise UserError(
            f"{name}: has the colours {image.mode}; accepted is RGB, grey or a palette, of 8 bits "
            "and without transparency"
        )
    return np.asarray(image.convert("RGB"))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Returns the contents of a PNG file with these pixels, uint8[H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
