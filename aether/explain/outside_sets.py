"""Inputs that are none of a data set's kind, made from it by pure functions of a seed."""

from collections.abc import Callable

import numpy as np

from aether.errors import InputError

Make = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def uniform(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return noise, every pixel uniform in 0..255."""
    return rng.integers(0, 256, images.shape, np.uint8)


def gaussian(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return noise with the mean and the standard deviation of all pixels, before it is clipped to 0..255."""
    return _bytes(rng.normal(images.mean(), images.std(), images.shape))


def shuffled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return every image with its pixels in an order of its own."""
    flat = images.reshape(len(images), -1, images.shape[-1])
    order = rng.permuted(np.tile(np.arange(flat.shape[1]), (len(images), 1)), axis=1)
    return np.take_along_axis(flat, order[..., None], 1).reshape(images.shape)


def rotated(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images, square ones, turned by 90 degrees."""
    return np.ascontiguousarray(np.rot90(images, 1, (1, 2)))


def inverted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return 255 − x."""
    return 255 - images


def blurred(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images three times smoothed by (1 2 1)/4 along both axes, the edge repeated beyond it."""
    x = images.astype(np.float64)
    for axis in (1, 2, 1, 2, 1, 2):
        low, high = (np.take(x, np.clip(np.arange(x.shape[axis]) + d, 0, x.shape[axis] - 1), axis) for d in (-1, 1))
        x = (low + 2 * x + high) / 4
    return _bytes(x)


def random_ids(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return ids that are uniform up to the largest that occurs."""
    return rng.integers(0, int(ids.max()) + 1, ids.shape).astype(ids.dtype)


def shuffled_ids(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return every text with its ids in an order of its own."""
    return rng.permuted(ids, axis=1)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


# number of axes of the data -> name -> how such a set is made: ids (n, t), images (n, h, w, c) of uint8
OUTSIDE: dict[int, dict[str, Make]] = {
    2: {"random ids": random_ids, "shuffled": shuffled_ids},
    4: {
        "uniform noise": uniform,
        "gaussian noise": gaussian,
        "shuffled": shuffled,
        "rotated": rotated,
        "inverted": inverted,
        "blurred": blurred,
    },
}


def made(data: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a set of each kind of OUTSIDE by name, made from ids (n, t), or from images (n, h, w, c) of uint8.

    Raises:
      InputError: the data are neither.
    """
    if data.ndim not in OUTSIDE or (data.ndim == 4) != (data.dtype == np.uint8):
        raise InputError(
            f"The data are {data.shape} of {data.dtype}; give ids (n, t), or images (n, h, w, c) of uint8."
        )
    makes = OUTSIDE[data.ndim]
    return {name: make(data, np.random.default_rng([seed, i])) for i, (name, make) in enumerate(makes.items())}
