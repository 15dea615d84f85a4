"""What a data set tells of a network's units: the inputs nearest to each, how much each responds, the silent ones."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aether.errors import InputError
from aether.explain.layers import layer_of, layers_of, watching
from aether.explain.points import centres_of, directions, points_of
from aether.explain.prototypes import KINDS, SILENT, check_by


class Found(NamedTuple):
    """The inputs of a data set that come nearest to each prototype, the nearest first.

    Attributes:
      rows: (units, m), numbers of documents or images, counted over all batches.
      places: (units, m), the position in the document, or the number of the patch in the image, row by row.
      values: (units, m), distances or |responses|.
      contexts: (units, m, length), of documents the ids up to that position, before their first -1; else None.
      among: how many places an input has.
    """

    rows: np.ndarray
    places: np.ndarray
    values: np.ndarray
    contexts: np.ndarray | None
    among: int


class Silent(NamedTuple):
    """The units that do not respond: their numbers, the largest |y| of every unit, and the layer's scale."""

    units: np.ndarray
    largest: np.ndarray
    scale: float


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
    return survey(model, batches, m, names=[name], by=by, length=length)[name].nearest


class Surveyed(NamedTuple):
    """What a data set tells of a layer's units: the nearest inputs of each, and how much each responds at most."""

    nearest: Found
    responses: Silent


def survey(
    model: Any,
    batches: Iterable[np.ndarray],
    m: int,
    *,
    names: Sequence[str] = (),
    by: str = "distance",
    length: int = 16,
    threshold: float = SILENT,
) -> dict[str, Surveyed]:
    """Return `nearest_inputs` and `silent_units` of several layers, all of them by default, from one pass over data.

    Raises:
      InputError: there is no such layer, no layer with prototypes, no input, or `by` is neither.
    """
    there = [name for name, layer in layers_of(model).items() if isinstance(layer, KINDS)]
    layers = {name: layer_of(model, name, KINDS) for name in names or there or [""]}
    watch, first = watching(model), 0
    best = {name: _Best(layer, m, length, by) for name, layer in layers.items()}
    loud = {name: _Loud() for name in layers}
    for x in batches:
        found = watch(x)
        for name, layer in layers.items():
            best[name].add(points_of(layer, found[name].x), x, first)
            loud[name].add(found[name].y)
        first += len(x)
    if not (first and m > 0):
        raise InputError("There is no input to compare prototypes with; give some data, and m above 0.")
    return {name: Surveyed(best[name].found(), loud[name].silent(threshold)) for name in layers}


class _Best:
    """The inputs that are nearest to each unit of a layer so far: chosen in float32, told by differences in float64."""

    def __init__(self, layer: Any, m: int, length: int, by: str):
        check_by(by)
        self.layer, self.m, self.length, self.by = layer, m, length, by
        self.centres = centres_of(layer)
        self.key = np.empty((len(self.centres), 0))
        self.rows, self.places = (np.empty(self.key.shape, np.int64) for _ in range(2))
        self.contexts, self.ids, self.among = np.empty((*self.key.shape, length), np.int64), False, 0

    def add(self, points: np.ndarray, x: np.ndarray, first: int) -> None:
        """Take the points (n, d) of a batch x whose first input has this number."""
        points = directions(points) if self.layer.spherical else points
        dots = self.centres.astype(np.float32) @ points.T
        rough = self._key(_squares(self.centres, points) - 2 * dots, dots)
        few = np.sort(np.argpartition(rough, min(self.m, len(points)) - 1, -1)[:, : self.m], -1)
        near, centres = points[few].astype(np.float64), self.centres[:, None]
        exact = self._key(np.sum((near - centres) ** 2, -1), np.sum(near * centres, -1))
        self.among = len(points) // len(x)
        row, place = np.divmod(few, self.among)
        key = np.concatenate([self.key, exact], -1)
        best = np.argsort(key, -1, kind="stable")[:, : self.m]
        self.key, self.rows, self.places = (
            np.take_along_axis(a, best, -1)
            for a in (key, np.concatenate([self.rows, first + row], -1), np.concatenate([self.places, place], -1))
        )
        self.ids = x.ndim == 2
        if self.ids:
            new = _contexts(x, row, place, self.length)
            self.contexts = np.take_along_axis(np.concatenate([self.contexts, new], 1), best[..., None], 1)

    def _key(self, squares: np.ndarray, dots: np.ndarray) -> np.ndarray:
        """Return what is smallest where an input is nearest, of ‖x − w‖² and x·w, (units, n)."""
        if self.by == "distance":
            return squares
        unit = self.layer.unit()
        bias, alpha, epsilon = (np.asarray(unit[name]).reshape(-1, 1) for name in ("bias", "alpha", "epsilon"))
        return -np.abs(alpha * (dots + bias) ** 2 / (squares + epsilon))

    def found(self) -> Found:
        """Return them."""
        values = np.sqrt(self.key) if self.by == "distance" else -self.key
        return Found(self.rows, self.places, values, self.contexts if self.ids else None, self.among)


def _squares(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return ‖w‖² + ‖x‖² of all, (units, n), float32."""
    return np.add.outer(np.sum(centres**2, -1), np.sum(points.astype(np.float64) ** 2, -1)).astype(np.float32)


class _Loud:
    """The largest |y| of each unit so far, and the mean square of all."""

    def __init__(self) -> None:
        self.count, self.total, self.largest = 0, 0.0, np.zeros(())

    def add(self, y: np.ndarray) -> None:
        """Take the outputs (..., units) of a batch."""
        y = np.abs(np.asarray(y, np.float64).reshape(-1, y.shape[-1]))
        self.largest, self.total = np.maximum(self.largest, y.max(0)), self.total + float(np.sum(y * y))
        self.count += y.size

    def silent(self, threshold: float) -> Silent:
        """Return the units below threshold times the root mean square."""
        scale = (self.total / self.count) ** 0.5
        return Silent(np.flatnonzero(self.largest < threshold * scale), self.largest, scale)


def _contexts(ids: np.ndarray, rows: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """Return the last `length` ids up to each place, (..., length), -1 before a document's first."""
    at = places[..., None] + np.arange(1 - length, 1)
    return np.where(at >= 0, ids[rows[..., None], np.maximum(at, 0)], -1)


def silent_units(model: Any, name: str, batches: Iterable[np.ndarray], threshold: float = SILENT) -> Silent:
    """Return the units of a layer whose |y| stays below threshold · scale over a whole data set.

    The scale is the root mean square of the layer's outputs over all data, places and units.

    Raises:
      InputError: there is no such layer, or no data.
    """
    layer_of(model, name, KINDS)
    watch, loud = watching(model), _Loud()
    for x in batches:
        loud.add(watch(x)[name].y)
    if not loud.count:
        raise InputError(f"There is no input to see the units of {name} respond to; give some data.")
    return loud.silent(threshold)
