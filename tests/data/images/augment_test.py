import numpy as np
import pytest

from aether.data.images import augment


def seeds(count):
    return (np.random.default_rng([7, k]) for k in range(count))


@pytest.fixture(params=[1, 3])
def image(request, rng):
    return rng.integers(1, 256, (6, 7, request.param), np.uint8)


def test_pad_crop_is_a_window_of_the_padded_picture(image):
    before, p = image.copy(), 2
    padded = np.pad(image, ((p, p), (p, p), (0, 0)))
    windows = {padded[y : y + 6, x : x + 7].tobytes(): (y, x) for y in range(5) for x in range(5)}
    seen = [windows[augment.pad_crop(image, rng, p).tobytes()] for rng in seeds(300)]
    assert len(set(seen)) == 25 and np.array_equal(image, before), "every window, the outermost too"
    assert max(np.bincount([5 * y + x for y, x in seen])) < 30, "none far more often than its 12 times"


def test_flip_mirrors_half_of_the_time(image):
    mirrored = [not np.array_equal(augment.flip(image, rng), image) for rng in seeds(200)]
    assert 70 < sum(mirrored) < 130
    for k in range(200):
        twice = augment.flip(augment.flip(image, np.random.default_rng([7, k])), np.random.default_rng([7, k]))
        assert np.array_equal(twice, image)
    assert {augment.flip(image, rng).tobytes() for rng in seeds(20)} == {image.tobytes(), image[:, ::-1].tobytes()}


@pytest.mark.parametrize("sides", [(100, 100), (300, 200), (90, 110)])
@pytest.mark.parametrize("low", [0.08, 0.5])
def test_resized_boxes_are_within_their_bounds(sides, low):
    width, height = sides
    boxes = np.array([augment.resized_box(width, height, rng, low) for rng in seeds(500)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    share, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert (share > low * 0.999).all() and share.max() > 0.8 and share.min() < low + 0.1
    assert (ratio > 3 / 4 - 1e-6).all() and (ratio < 4 / 3 + 1e-6).all() and ratio.min() < 0.8 and ratio.max() > 1.25
    assert np.ptp(left) > 0.2 * width and np.ptp(top) > 0.2 * height


def test_the_box_of_a_picture_far_from_square_is_the_largest_central_one():
    assert augment.resized_box(400, 30, np.random.default_rng(0), 0.9) == (180, 0, 220, 30)
    assert augment.resized_box(30, 400, np.random.default_rng(0), 0.9) == (0, 180, 30, 220)


def reference_jitter(image, factors):
    """Brightness, contrast and saturation in float64."""
    luma = lambda x: x @ [0.299, 0.587, 0.114] if x.shape[-1] == 3 else x[..., 0]  # noqa: E731
    out = image * np.float64(factors[0])
    out = factors[1] * out + (1 - factors[1]) * luma(out).mean()
    if image.shape[-1] == 3:
        out = factors[2] * out + (1 - factors[2]) * luma(out)[..., None]
    return np.clip(out, 0, 255)


@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_jitter(image, strength):
    factors = np.array([1 + strength * (2 * rng.random(3, np.float32) - 1) for rng in seeds(50)])
    assert factors.min() < 1 - 0.8 * strength and factors.max() > 1 + 0.8 * strength
    for rng, three in zip(seeds(50), factors, strict=True):
        got = augment.jitter(image, rng, strength)
        assert got.dtype == np.uint8 and got.shape == image.shape
        np.testing.assert_allclose(got, reference_jitter(image, three), atol=0.51)


def test_jitter_of_no_strength_changes_nothing(image):
    assert np.array_equal(augment.jitter(image, np.random.default_rng(0), 0.0), image)


@pytest.mark.parametrize("side", [1, 3, 4])
def test_cutout_fills_one_square(image, side):
    image, before = np.maximum(image, 1), image.copy()
    corners = set()
    for rng in seeds(400):
        out = augment.cutout(image, rng, side, 0)
        rows, columns = (np.flatnonzero((out == 0).all(-1).any(axis)) for axis in (1, 0))
        changed = (out != image).any(-1)
        assert changed.sum() == len(rows) * len(columns) and np.array_equal(out[~changed], image[~changed])
        assert 1 <= len(rows) <= side and 1 <= len(columns) <= side
        corners.add((rows[0], columns[0], len(rows), len(columns)))
    assert any(c[2:] == (side, side) for c in corners) and np.array_equal(image, before)
    assert len(corners) == 42, "one for every pixel that may be the centre"
