"""RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719): a few of fourteen operations, equally strong.

With l = magnitude/30 and s a random sign: shear by s·0.3·l; shift by s·0.45·l of the side; turn by s·30·l degrees;
colour, contrast, brightness, sharpness times 1 + s·0.9·l; posterise to 8 − 4·l bits; solarise from 256·(1 − l) on.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVELS = 30
Operation = Callable[[Image.Image, float, int, int], Image.Image]  # picture, level 0..1, sign, fill


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
    """Return the picture whose pixel (x, y), from the centre, is the old one at matrix · (x, y, 1)."""
    a, b, c, d, e, f = matrix
    x, y = image.width / 2, image.height / 2
    about = (a, b, x + c - a * x - b * y, d, e, y + f - d * x - e * y)
    colour = fill if image.mode == "L" else (fill, fill, fill)
    return image.transform(image.size, Image.Transform.AFFINE, about, Image.Resampling.BILINEAR, fillcolor=colour)


def _rotate(image: Image.Image, level: float, sign: int, fill: int) -> Image.Image:
    angle = math.radians(sign * 30 * level)
    return _affine(image, (math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0), fill)


def _enhanced(kind: Callable) -> Operation:
    return lambda image, level, sign, fill: kind(image).enhance(1 + sign * 0.9 * level)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level, sign, fill: image,
    "autocontrast": lambda image, level, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign, fill: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": lambda image, level, sign, fill: ImageOps.solarize(image, round(256 * (1 - level))),
    "color": _enhanced(ImageEnhance.Color),
    "posterize": lambda image, level, sign, fill: ImageOps.posterize(image, 8 - round(4 * level)),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign, fill: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), fill),
    "shear_y": lambda image, level, sign, fill: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), fill),
    "translate_x": lambda image, level, sign, fill: _affine(
        image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0), fill
    ),
    "translate_y": lambda image, level, sign, fill: _affine(
        image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height), fill
    ),
}
NAMES = tuple(OPERATIONS)


def randaugment(
    image: np.ndarray, rng: np.random.Generator, operations: int, magnitude: float, fill: int
) -> np.ndarray:
    """Return a picture after `operations` operations, each drawn anew, of a magnitude from 0 to 30."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    for draw, sign in rng.random((operations, 2)):
        picture = OPERATIONS[NAMES[int(draw * len(NAMES))]](picture, magnitude / LEVELS, 1 if sign < 0.5 else -1, fill)
    return np.asarray(picture).reshape(image.shape)
