"""What the prototypes of a layer are like: how they answer to points, equal ones, pictures of a first layer."""

from typing import Any, NamedTuple

import numpy as np

from aether.errors import InputError
from aether.explain.duplicates import close_pairs
from aether.explain.points import centres_of, directions
from aether.models.resnet import NormalizedConv, ResNet
from aether.models.vit import ViT
from aether.nn import YatConv2D, YatNMN

KINDS = (YatNMN, YatConv2D)  # layers that have prototypes
SILENT = 1e-3  # of a layer's scale: the largest response of a unit that counts as silent
_BY = ("distance", "response")


class Nearest(NamedTuple):
    """The nearest prototypes of n inputs: `units` (n, m), the nearest first, and `values` (n, m) that say how near."""

    units: np.ndarray
    values: np.ndarray


def compared(layer: Any, points: np.ndarray, by: str = "distance") -> np.ndarray:
    """Return the distance ‖x − w‖ of every point and prototype, or the response α (x·w + b)²/(‖x − w‖² + ε).

    Args:
      layer: with prototypes; a spherical one compares unit vectors.
      points: (n, d), as `aether.explain.points.points_of` returns them.
      by: "distance" or "response".

    Returns:
      (n, units), float64, by the expanded distance.

    Raises:
      InputError: `by` is neither, or the points have another width.
    """
    check_by(by)
    w, x = centres_of(layer), np.asarray(points, np.float64)
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise InputError(f"The points are {x.shape} and the prototypes {w.shape}; give points (n, {w.shape[1]}).")
    x = directions(x) if layer.spherical else x
    dots = x @ w.T
    squares = np.maximum(np.sum(x * x, -1)[:, None] + np.sum(w * w, -1) - 2 * dots, 0.0)
    if by == "distance":
        return np.sqrt(squares)
    bias, alpha, epsilon = (np.asarray(layer.unit()[name], np.float64) for name in ("bias", "alpha", "epsilon"))
    return alpha * (dots + bias) ** 2 / (squares + epsilon)


def check_by(by: str) -> None:
    """Refuse a way to compare that there is not."""
    if by not in _BY:
        raise InputError(f"by is {by!r}; it takes one of {', '.join(_BY)}.")


def nearest_prototypes(layer: Any, points: np.ndarray, m: int, by: str = "distance") -> Nearest:
    """Return the m prototypes nearest to each point (n, d), or of the largest |response|; errors are `compared`'s."""
    values = compared(layer, points, by)
    order = np.argsort(values if by == "distance" else -np.abs(values), -1, kind="stable")[:, :m]
    return Nearest(order, np.take_along_axis(values, order, -1))


def duplicates(layer: Any, threshold: float, *, by: str = "distance") -> list[tuple[int, int, float]]:
    """Return (i, j, value), i < j, of prototypes that are near each other, the nearest first.

    By "distance", ‖w_i − w_j‖ ≤ threshold as the layer compares them; by "cosine", cos(w_i, w_j) ≥ threshold.
    """
    centres = centres_of(layer)
    if by == "distance":
        return close_pairs(centres, threshold, relative=False)
    if by != "cosine" or not -1 <= threshold <= 1:
        raise InputError(f"by is {by!r} and threshold {threshold}; it takes distance, or cosine with one in -1..1.")
    pairs = close_pairs(directions(centres), (2 - 2 * threshold) ** 0.5, relative=False)
    return [(i, j, 1 - distance**2 / 2) for i, j, distance in pairs]


def first_layer(model: Any) -> np.ndarray:
    """Return what a network's first layer compares images with, (units, h, w, c) in 0..1; of a baseline its kernels.

    Raises:
      InputError: the network reads text.
    """
    if isinstance(model, ViT):
        return as_images(np.asarray(model.patches.kernel[...]), (*2 * (model.config.patch,), model.shape[-1]))
    if not isinstance(model, ResNet):
        raise InputError(f"model.kind is {model.config.kind}, which reads text; its first layer has no pictures.")
    stem = model.stem.conv if isinstance(model.stem, NormalizedConv) else model.stem
    return as_images(np.asarray(stem.kernel[...]))


def as_images(kernel: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Return the columns of a kernel as pictures (units, h, w, c), ½ + w / (2 max|w|) of each: 0 is grey.

    Args:
      kernel: (h, w, c, units), or (h · w · c, units) of a dense layer.
      shape: (h, w, c) of a dense layer's.

    Raises:
      InputError: the kernel is not of that shape.
    """
    shape = shape or kernel.shape[:-1]
    if len(shape) != 3 or np.prod(shape) * kernel.shape[-1] != kernel.size:
        raise InputError(f"The kernel is {kernel.shape} and its pictures {shape}; give the (h, w, c) of its columns.")
    columns = np.moveaxis(kernel.reshape(*shape, -1), -1, 0).astype(np.float64)
    largest = np.max(np.abs(columns), (1, 2, 3), keepdims=True)
    return 0.5 + columns / np.where(largest, 2 * largest, 1.0)
