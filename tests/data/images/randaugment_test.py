import numpy as np
import pytest
from PIL import Image

from aether.data.images import randaugment
from aether.data.images.randaugment import NAMES, OPERATIONS


@pytest.fixture(params=[1, 3])
def image(request, rng):
    return rng.integers(20, 230, (16, 20, request.param), np.uint8)


def applied(name, image, level, sign=1, fill=77):
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(OPERATIONS[name](picture, level, sign, fill)).reshape(image.shape)


def bilinear(image, inverse, fill):
    """Sample a picture in float64 where `inverse` (x, y from the centre) says; `fill` beyond its pixels' centres."""
    height, width, _ = image.shape
    y, x = np.mgrid[0:height, 0:width] + 0.5
    u, v = inverse(x - width / 2, y - height / 2)
    u, v = u + width / 2 - 0.5, v + height / 2 - 0.5
    x0, y0 = np.clip(np.floor(u), 0, width - 2).astype(int), np.clip(np.floor(v), 0, height - 2).astype(int)
    fx, fy = (u - x0)[..., None], (v - y0)[..., None]
    top = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
    bottom = image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx
    inside = (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
    far = (u < -0.5) | (u > width - 0.5) | (v < -0.5) | (v > height - 0.5)
    return np.where(far[..., None], fill, top * (1 - fy) + bottom * fy), inside | far


def angle(level, sign):
    return np.radians(30 * level * sign)


INVERSES = {
    "shear_x": lambda x, y, s: (x + 0.3 * s * y, y),
    "shear_y": lambda x, y, s: (x, y + 0.3 * s * x),
    "translate_x": lambda x, y, s: (x + 0.45 * s * 20, y),
    "translate_y": lambda x, y, s: (x, y + 0.45 * s * 16),
    "rotate": lambda x, y, s: (
        np.cos(np.pi / 6 * s) * x + np.sin(np.pi / 6 * s) * y,
        np.cos(np.pi / 6 * s) * y - np.sin(np.pi / 6 * s) * x,
    ),
}


@pytest.mark.parametrize("name", INVERSES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.3, 1.0])
def test_geometry(image, name, sign, level):
    got = applied(name, image, level, sign)
    want, sure = bilinear(image.astype(np.float64), lambda x, y: INVERSES[name](x, y, sign * level), 77)
    assert sure.mean() > 0.8
    np.testing.assert_allclose(got[sure], want[sure], atol=1.5)


def luma(image):
    return image @ np.array([0.299, 0.587, 0.114]) if image.shape[-1] == 3 else image[..., 0].astype(np.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_colours(image, sign):
    level, factor = 0.5, 1 + sign * 0.45
    near = lambda name, want: np.testing.assert_allclose(  # noqa: E731
        applied(name, image, level, sign), np.clip(want, 0, 255), atol=1.6
    )
    x = image.astype(np.float64)
    near("brightness", x * factor)
    near("contrast", x * factor + luma(x).mean() * (1 - factor))
    near("color", x * factor + luma(x)[..., None] * (1 - factor))
    assert np.array_equal(applied("posterize", image, level), image & 0b11111100)
    assert np.array_equal(applied("solarize", image, level), np.where(image < 128, image, 255 - image))
    blur = (
        sum(np.roll(x, (dy, dx), (0, 1)) * (5 if dy == dx == 0 else 1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 13
    )
    want = np.clip(x * factor + blur * (1 - factor), 0, 255)[1:-1, 1:-1]
    np.testing.assert_allclose(applied("sharpness", image, level, sign)[1:-1, 1:-1], want, atol=1.6)


def test_histograms(image, rng):
    got = applied("autocontrast", image, 0.3).astype(np.float64)
    low, high = image.min((0, 1)), image.max((0, 1))
    np.testing.assert_allclose(got, (image - low) * 255.0 / (high - low), atol=1.01)
    wide = np.clip(rng.normal(128, 20, (64, 64, image.shape[-1])), 0, 255).astype(np.uint8)
    ranks = np.argsort(np.argsort(wide[..., 0].ravel(), kind="stable"), kind="stable") / 64**2
    assert abs(applied("equalize", wide, 0.3)[..., 0].ravel() / 255 - ranks).max() < 0.08


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"autocontrast", "equalize"}))
def test_magnitude_0_changes_nothing(image, name):
    image = image.copy()
    image[0, :2] = [[0], [255]]
    assert np.array_equal(applied(name, image, 0.0), image) and np.array_equal(applied(name, image, 0.0, -1), image)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"identity"}))
def test_every_other_operation_does_something(rng, name):
    image = rng.integers(20, 230, (16, 20, 3), np.uint8)
    assert not np.array_equal(applied(name, image, 1.0), image)


def test_randaugment_draws_operations_and_signs_alike(image, monkeypatch):
    drawn = []
    for name in NAMES:
        note = lambda p, level, sign, fill, name=name: drawn.append((name, level, sign, fill)) or p  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, note)
    for k in range(500):
        assert np.array_equal(randaugment.randaugment(image, np.random.default_rng([3, k]), 2, 9, 100), image)
    assert len(drawn) == 1000 and {d[1] for d in drawn} == {0.3} and {d[3] for d in drawn} == {100}
    counts = [sum(d[0] == name for d in drawn) for name in NAMES]
    assert len(NAMES) == 14 and 40 < min(counts) and max(counts) < 110
    assert 400 < sum(d[2] == 1 for d in drawn) < 600


def test_form_and_determinism(image):
    before = image.copy()
    for k in range(100):
        one, two = (randaugment.randaugment(image, np.random.default_rng([3, k]), 2, 30, 100) for _ in range(2))
        assert np.array_equal(one, two) and one.dtype == np.uint8 and one.shape == image.shape
    assert np.array_equal(image, before)
