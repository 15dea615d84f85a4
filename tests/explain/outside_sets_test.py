"""Sets that are made of others: what they are, and that they are functions of the seed."""

import numpy as np
import pytest

from aether.errors import InputError
from aether.explain.outside_sets import OUTSIDE, made


@pytest.fixture
def images(rng):
    return np.minimum(rng.integers(0, 300, (40, 9, 9, 3)), 255).astype(np.uint8)


def test_images_of_another_kind(images):
    found = made(images, seed=3)
    assert list(found) == list(OUTSIDE[4])
    assert all(x.shape == images.shape and x.dtype == np.uint8 for x in found.values())
    assert all(np.mean(x != images) > 0.5 for x in found.values())
    noise = found["uniform noise"].astype(float)
    assert noise.min() == 0 and noise.max() == 255 and noise.mean() == pytest.approx(127.5, abs=3)
    assert noise.std() == pytest.approx(np.sqrt((256**2 - 1) / 12), rel=0.02)
    dim = made(images // 4 + 90)["gaussian noise"].astype(float)  # far from what is clipped
    assert dim.mean() == pytest.approx((images // 4 + 90).mean(), abs=0.5)
    assert dim.std() == pytest.approx((images // 4 + 90).std(), rel=0.02)
    flat, mixed = (x.reshape(40, 81, 3).tolist() for x in (images, found["shuffled"]))
    assert [sorted(one) for one in mixed] == [sorted(one) for one in flat]
    orders = [[one.index(pixel) for pixel in other] for one, other in zip(flat[:2], mixed[:2], strict=True)]
    assert orders[0] != orders[1], "an order for each"
    for y, x in ((0, 0), (2, 7), (8, 3)):
        np.testing.assert_array_equal(found["rotated"][:, y, x], images[:, x, 8 - y])
    np.testing.assert_array_equal(found["inverted"].astype(int) + images, 255)


def test_blurring_is_a_binomial_and_keeps_what_is_even():
    images = np.zeros((2, 15, 15, 1), np.uint8)
    images[0, 7, 7], images[1] = 255, 99
    found = made(images)["blurred"]
    row = np.array([1, 6, 15, 20, 15, 6, 1]) / 64
    np.testing.assert_array_equal(found[0, 4:11, 4:11, 0], np.rint(255 * row[:, None] * row))
    assert found[0].sum() == np.rint(255 * row[:, None] * row).sum() and (found[1] == 99).all()


def test_texts_of_another_kind(rng):
    ids = (np.arange(50)[:, None] + rng.integers(0, 40, (50, 30))).astype(np.int32)
    found = made(ids)
    assert list(found) == list(OUTSIDE[2]) and all(x.dtype == np.int32 for x in found.values())
    random, mixed = found["random ids"], found["shuffled"]
    assert random.min() >= 0 and random.max() <= ids.max() and len(np.unique(random)) == ids.max() + 1
    np.testing.assert_array_equal(np.sort(mixed, 1), np.sort(ids, 1))
    assert (mixed != ids).mean() > 0.5


def test_sets_are_functions_of_the_seed(images):
    before = images.copy()
    once, again, other = made(images, 1), made(images, 1), made(images, 2)
    for name in once:
        np.testing.assert_array_equal(once[name], again[name])
        assert np.array_equal(once[name], other[name]) == (name in ("rotated", "inverted", "blurred"))
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (3, 8, 8)])
def test_other_data_are_refused(shape):
    with pytest.raises(InputError, match=r"The data are \(3, 8, 8.*of float64; give ids"):
        made(np.ones(shape))
