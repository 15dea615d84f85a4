"""Random changes of one picture: pure functions of a uint8 array (height, width, channels) and a generator.

None changes its input. What a crop, a turn or a hole leaves empty is `fill`, the training set's mean, which is zero for
the model; a padded crop is black, as is usual.
"""

import math

import numpy as np

from aether.data.images.decode import Box

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
TRIES = 10


def pad_crop(image: np.ndarray, rng: np.random.Generator, padding: int) -> np.ndarray:
    """Pad with black on all sides and return a window of the old size."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    top, left = (rng.random(2) * (2 * padding + 1)).astype(int)
    return padded[top : top + height, left : left + width]


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the mirror image, left for right, of every second picture."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resized_box(width: int, height: int, rng: np.random.Generator, min_scale: float) -> Box:
    """Return a box with `min_scale` to all of the area and a ratio of 3/4 to 4/3 ("Inception crop").

    Where no such box is found in ten tries: the largest central one (https://arxiv.org/abs/1409.4842).
    """
    for scale, ratio, x, y in rng.random((TRIES, 4)):
        area = width * height * (min_scale + scale * (1 - min_scale))
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, min(left + w, width), min(top + h, height)
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Scale brightness, contrast and saturation, in this order, each by a factor from 1 - strength to 1 + strength."""
    brightness, contrast, saturation = np.maximum(1 + strength * (2 * rng.random(3, np.float32) - 1), 0)
    out = image * brightness
    mean = _luma(out).mean()
    out = (out - mean) * contrast + mean
    if image.shape[-1] == 3:
        grey = _luma(out)[..., None]
        out = (out - grey) * saturation + grey
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _luma(image: np.ndarray) -> np.ndarray:
    return image @ LUMA if image.shape[-1] == 3 else image[..., 0]


def cutout(image: np.ndarray, rng: np.random.Generator, side: int, fill: int) -> np.ndarray:
    """Fill a square around a random pixel; it may reach beyond the edge (https://arxiv.org/abs/1708.04552)."""
    height, width, _ = image.shape
    y, x = (rng.random(2) * (height, width)).astype(int) - side // 2
    out = image.copy()
    out[max(y, 0) : y + side, max(x, 0) : x + side] = fill
    return out
