"""Which prototypes of a layer are the same, or nearly."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aether.explain.layers import layers_of
from aether.explain.points import directions
from aether.explain.surgery import Place, places_of

_ROWS = 512  # compared with all others at once
_ROUNDING = 1e-12  # of expanded squared distances in float64, as a share of the squared lengths


def close_pairs(centres: np.ndarray, tolerance: float, *, relative: bool = True) -> list[tuple[int, int, float]]:
    """Return (i, j, distance), i < j, of the rows of `centres` (n, d) that are near each other, the nearest first.

    They are if ‖w_i − w_j‖ ≤ tolerance, or with `relative` tolerance · max(‖w_i‖, ‖w_j‖). Candidates are found by
    expanded distances and compared by differences, in float64, so that a tolerance of 0 finds equal rows alone.
    """
    w = np.asarray(centres, np.float64)
    squares = np.sum(w * w, -1)
    found = []
    for i, j in _candidates(w, squares, tolerance, relative):
        distance = float(np.linalg.norm(w[i] - w[j]))
        if distance <= tolerance * (max(squares[i], squares[j]) ** 0.5 if relative else 1.0):
            found.append((i, j, distance))
    return sorted(found, key=lambda pair: (pair[2], *pair[:2]))


def _candidates(w: np.ndarray, squares: np.ndarray, tolerance: float, relative: bool) -> Iterator[tuple[int, int]]:
    for start in range(0, len(w), _ROWS):
        rows = slice(start, start + _ROWS)
        largest = np.maximum(squares[rows, None], squares)
        gaps = squares[rows, None] + squares - 2 * w[rows] @ w.T
        near = gaps <= tolerance**2 * (largest if relative else 1.0) + _ROUNDING * largest
        for i, j in np.argwhere(near):
            if start + i < j:
                yield int(start + i), int(j)


def equal_units(arrays: Sequence[Mapping[str, np.ndarray]], model: Any, tolerance: float) -> dict[str, list]:
    """Return for each hidden layer the pairs (kept, gone) of units that are the same to within a tolerance.

    Two are if ‖w − w'‖ ≤ tolerance · max(‖w‖, ‖w'‖), of unit vectors in a spherical layer, and |b − b'| ≤ tolerance of
    their biases as stored, in all of `arrays`: the parameters, and averages of them. The nearest come first, and each
    that goes is near the one kept, whatever else that stands for.

    Args:
      arrays: by path, as in `aether.explain.surgery`.
      model: the network.
      tolerance: at least 0.
    """
    layers = layers_of(model)
    return {
        name: _chosen([_units(values, place, layers[name].spherical) for values in arrays], tolerance)
        for name, place in places_of(model).items()
    }


def _units(values: Mapping[str, np.ndarray], place: Place, spherical: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return centres (n, d), directions if nothing else counts, and biases (n,), float64."""

    def of(role: str) -> np.ndarray:
        whole = values[f"{place.stack}/hidden/{role}"]
        return np.asarray(whole if place.block is None else whole[place.block], np.float64)

    centres = of("kernel").reshape(-1, place.units).T
    has_bias = f"{place.stack}/hidden/bias" in values
    return directions(centres) if spherical else centres, of("bias") if has_bias else np.zeros(place.units)


def _chosen(parts: list[tuple[np.ndarray, np.ndarray]], tolerance: float) -> list[tuple[int, int]]:
    """Return the pairs to merge: no unit goes twice, and none is kept and goes."""
    near = [{pair[:2]: pair for pair in close_pairs(centres, tolerance)} for centres, _ in parts]
    kept: set[int] = set()
    gone: set[int] = set()
    chosen = []
    for i, j in near[0]:
        if any((i, j) not in other for other in near) or any(abs(b[i] - b[j]) > tolerance for _, b in parts):
            continue
        if {i, j} & gone or {i, j} <= kept:
            continue
        stays, goes = (j, i) if j in kept else (i, j)
        chosen.append((stays, goes))
        kept.add(stays)
        gone.add(goes)
    return chosen
