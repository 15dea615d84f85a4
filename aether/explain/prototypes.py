"""What the prototypes of a layer are like: nearest inputs, the nearest of them, equal ones, silent ones, pictures."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from aether.errors import InputError
from aether.explain.duplicates import close_pairs
from aether.explain.layers import layer_of, watching
from aether.explain.points import centres_of, directions, points_of
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


class Found(NamedTuple):
    """The inputs of a data set that come nearest to each prototype, the nearest first.

    Attributes:
      rows: (units, m), numbers of documents or images, counted over all batches.
      places: (units, m), the position in the document, or the number of the patch in the image, row by row.
      values: (units, m), distances or |responses|.
      contexts: (units, m, length), of documents the ids up to that position, before their first -1; else None.
    """

    rows: np.ndarray
    places: np.ndarray
    values: np.ndarray
    contexts: np.ndarray | None


class Silent(NamedTuple):
    """The units that do not respond: their numbers, the largest |y| of every unit, and the layer's scale."""

    units: np.ndarray
    largest: np.ndarray
    scale: float


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
    if by not in _BY:
        raise InputError(f"by is {by!r}; it takes one of {', '.join(_BY)}.")
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


def nearest_prototypes(layer: Any, points: np.ndarray, m: int, by: str = "distance") -> Nearest:
    """Return the m prototypes nearest to each point (n, d), or of the largest |response|; errors are `compared`'s."""
    values = compared(layer, points, by)
    order = np.argsort(values if by == "distance" else -np.abs(values), -1, kind="stable")[:, :m]
    return Nearest(order, np.take_along_axis(values, order, -1))


def nearest_inputs(
    model: Any, name: str, batches: Iterable[np.ndarray], m: int, *, by: str = "distance", length: int = 16
) -> Found:
    """Return the m inputs of a data set that come nearest to each prototype of a layer, or of the largest |response|.

    Of the data no more than a batch and what is found is kept. With less than m inputs there are so many.

    Args:
      model: the network.
      name: of the layer, see `aether.explain.layers`.
      batches: inputs of the network, ids (b, t) or images (b, s, s, c).
      m: how many.
      by: "distance" or "response".
      length: of the contexts, for ids.

    Raises:
      InputError: there is no such layer, no input, or `by` is neither.
    """
    layer, watch = layer_of(model, name, KINDS), watching(model)
    key = np.empty((centres_of(layer).shape[0], 0))
    rows, places = (np.empty(key.shape, np.int64) for _ in range(2))
    contexts, ids, first = np.empty((*key.shape, length), np.int64), False, 0
    for x in batches:
        points, ids = points_of(layer, watch(x)[name].x), x.ndim == 2
        values = compared(layer, points, by).T
        values = values if by == "distance" else -np.abs(values)
        few = np.sort(np.argpartition(values, min(m, len(points)) - 1, -1)[:, :m], -1)
        row, place = np.divmod(few, len(points) // len(x))
        key = np.concatenate([key, np.take_along_axis(values, few, -1)], -1)
        best = np.argsort(key, -1, kind="stable")[:, :m]
        key, rows, places = (
            np.take_along_axis(a, best, -1)
            for a in (key, np.concatenate([rows, first + row], -1), np.concatenate([places, place], -1))
        )
        if ids:
            new = _contexts(x, row, place, length)
            contexts = np.take_along_axis(np.concatenate([contexts, new], 1), best[..., None], 1)
        first += len(x)
    if not key.shape[1]:
        raise InputError(f"There is no input to compare the prototypes of {name} with; give some data, and m above 0.")
    return Found(rows, places, np.abs(key), contexts if ids else None)


def _contexts(ids: np.ndarray, rows: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """Return the last `length` ids up to each place, (..., length), -1 before a document's first."""
    at = places[..., None] + np.arange(1 - length, 1)
    return np.where(at >= 0, ids[rows[..., None], np.maximum(at, 0)], -1)


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


def silent_units(model: Any, name: str, batches: Iterable[np.ndarray], threshold: float = SILENT) -> Silent:
    """Return the units of a layer whose |y| stays below threshold · scale over a whole data set.

    The scale is the root mean square of the layer's outputs over all data, places and units.

    Raises:
      InputError: there is no such layer, or no data.
    """
    layer_of(model, name, KINDS)
    watch, count, total, largest = watching(model), 0, 0.0, np.zeros(())
    for x in batches:
        y = np.asarray(watch(x)[name].y, np.float64)
        y = np.abs(y.reshape(-1, y.shape[-1]))
        largest, total, count = np.maximum(largest, y.max(0)), total + np.sum(y * y), count + y.size
    if not count:
        raise InputError(f"There is no input to see the units of {name} respond to; give some data.")
    scale = (total / count) ** 0.5
    return Silent(np.flatnonzero(largest < threshold * scale), largest, scale)


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
