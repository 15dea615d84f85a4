"""From a file's bytes, or an array, to a square uint8 array of a given size."""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Choose = Callable[[int, int], Box]  # of width and height
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what files with these endings turn out to be
# What PIL raises for files that are damaged, or are no pictures.
BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = {1: "L", 3: "RGB"}

# About damaged EXIF beside a sound picture, which ImageNet has.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


def square(data: bytes | np.ndarray, size: int, channels: int, choose: Choose) -> np.ndarray:
    """Return a part of a picture, resized (bilinear over the whole part) to uint8 (size, size, channels).

    A picture that a camera marked as turned is turned upright; of a JPEG no more is decoded than the size needs;
    transparent pixels are white.

    Args:
      data: an encoded picture, or uint8 (height, width, 1 or 3).
      choose: (width, height) -> the part.

    Raises:
      BROKEN: the bytes are no whole picture.
    """
    if isinstance(data, np.ndarray):
        image, turn = Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data), 1
    else:
        image, turn = _opened(data)
    width, height = image.size[::-1] if turn >= 5 else image.size
    box = choose(width, height)
    factor = size / min(box[2] - box[0], box[3] - box[1])
    image.draft(MODES[channels], (math.ceil(image.width * factor), math.ceil(image.height * factor)))
    image = _plain(image, channels)
    image = image.transpose(TURNS[turn]) if turn in TURNS else image
    box = _scaled(box, image, image.width / width, image.height / height)
    if image.size != (size, size) or box != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    return np.asarray(image).reshape(size, size, channels)


def _opened(data: bytes) -> tuple[Image.Image, int]:
    """Return a picture, not yet decoded, and its orientation: 1, upright, where none can be read."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except BROKEN:
        turn = 1
    return image, turn if turn in TURNS else 1


def _scaled(box: Box, image: Image.Image, x: float, y: float) -> Box:
    return box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height)


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Return a picture with 8 bits a channel and no transparency, of 1 or 3 channels."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def centre(width: int, height: int, *, size: int, share: float) -> Box:
    """Return the central square whose side is `share` of the shorter side; the whole of what has the size already."""
    if width == height == size:
        return 0, 0, size, size
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def facts(data: bytes) -> tuple[int, int, bool]:
    """Decode a whole picture and return width and height, upright, and whether it is grey.

    Raises:
      BROKEN: the bytes are no whole picture.
    """
    image, turn = _opened(data)
    width, height = image.size[::-1] if turn >= 5 else image.size
    grey = image.mode in ("1", "L", "I;16")
    image.draft(None, (1, 1))  # reads every byte of a JPEG, at an eighth of the pixels
    image.load()
    return width, height, grey


def reason(error: Exception) -> str:
    """Say in a few words what is wrong with a picture."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture that PIL knows"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
