"""The pictures of a classifier's mistakes are PNGs that show what they are given."""

import io

import numpy as np
import pytest
from PIL import Image

from aether.evaluate.images import Mistake
from aether.evaluate.pictures import draw_confusion, draw_mistakes


def opened(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), np.int32)


def blue(pixels: np.ndarray) -> int:
    """How many pixels are of the map's dark end."""
    return int(((pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 0] < 60)).sum())


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_diagonal_is_dark_where_the_classes_are_right(classes):
    names = [f"class {i}" for i in range(classes)]
    right = opened(draw_confusion(np.eye(classes) * 9, names))
    spread = opened(draw_confusion(np.ones((classes, classes)), names))
    assert blue(right) > 2 * blue(spread) and min(right.shape[:2]) > 500
    assert max(right.shape[:2]) < 3000


def test_a_class_without_images_is_drawn():
    confusion = np.zeros((3, 3))
    confusion[0, 1] = 4
    assert opened(draw_confusion(confusion, ["a", "b", "ⵟ"])).std() > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_mistakes_show_their_images(channels):
    rng = np.random.default_rng(0)
    shown = [Mistake(0.9 - 0.01 * i, 0, 1, rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)) for i in range(8)]
    many, none = opened(draw_mistakes(shown, ["cat", "dog"], 100)), opened(draw_mistakes([], ["cat", "dog"], 100))
    assert many.std() > 2 * none.std() and many.shape[0] > none.shape[0]
