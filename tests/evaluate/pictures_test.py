"""The pictures of a classifier's mistakes are PNGs that show what they are given."""

import io

import numpy as np
import pytest
from PIL import Image

from aether.evaluate.images import Mistake
from aether.evaluate.pictures import _name, draw_confusion, draw_mistakes


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
    right = opened(draw_confusion(np.eye(classes) * 9, names, 9 * classes))
    spread = opened(draw_confusion(np.ones((classes, classes)), names, classes**2))
    assert blue(right) > 2 * blue(spread) and min(right.shape[:2]) > 500
    assert max(right.shape[:2]) < 3000


def test_a_class_without_images_is_drawn():
    confusion = np.zeros((3, 3))
    confusion[0, 1] = 4
    assert opened(draw_confusion(confusion, ["a", "b", "ⵟ"], 4)).std() > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_mistakes_show_their_images(channels):
    rng = np.random.default_rng(0)
    shown = [Mistake(0.9 - 0.01 * i, 0, 1, rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)) for i in range(8)]
    many, none = opened(draw_mistakes(shown, ["cat", "dog"], 100)), opened(draw_mistakes([], ["cat", "dog"], 100))
    assert many.std() > 2 * none.std() and many.shape[0] > none.shape[0]


@pytest.mark.parametrize(
    "names", [["$x$", "$\\frac{1$"], ["名", "ⵟ"], ["one"]], ids=["mathematics", "scripts", "fewer"]
)
def test_any_names_are_written_as_they_are(names):
    """Also fewer than the model has classes, and an image that was taken for nothing."""
    image = np.full((8, 8, 1), 99, np.uint8)
    shown = [Mistake(0.9, 0, 1, image), Mistake(0.5, 1, 2, image), Mistake(0.0, 2, -1, image)]
    assert opened(draw_mistakes(shown, names, 3)).std() > 1
    assert opened(draw_confusion(np.ones((3, 3)), names, 9)).std() > 1


def test_a_name_that_is_missing_is_a_number():
    assert [_name(["cat"], label) for label in (0, 1, -1)] == ["cat", "1", "nothing"]
