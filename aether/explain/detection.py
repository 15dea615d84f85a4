"""Telling what is outside from what is inside by a score, larger for what is further outside: the arithmetic."""

from dataclasses import dataclass

import numpy as np

from aether.errors import InputError

BINS = 15  # of equal width, over the confidence, as `aether.evaluate.images` has them
_PER_UNIT = 4  # rows that the covariance of one more feature needs
_MOST = 512  # features, whose covariance is inverted
_RIDGE = 1e-6  # of the mean variance


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return P(outside > inside) + ½ P(outside = inside) over all pairs of scores: 1 tells them apart, ½ is chance.

    Raises:
      InputError: there are none of either, or one is no number.
    """
    inside, outside = np.sort(_numbers(inside, "inside")), _numbers(outside, "outside")
    sides = (np.searchsorted(inside, outside, side) for side in ("left", "right"))
    return float(np.mean(sum(sides)) / (2 * len(inside)))


def threshold(inside: np.ndarray, kept: float = 0.95) -> float:
    """Return the least of the scores such that at least the share `kept` of them is not above it.

    Raises:
      InputError: there are none, one is no number, or the share is not in (0, 1].
    """
    if not 0.0 < kept <= 1.0:
        raise InputError(f"The share to be kept is {kept}; it must be above 0 and at most 1.")
    ordered = np.sort(_numbers(inside, "inside"))
    return float(ordered[min(int(np.ceil(kept * len(ordered) - 1e-9)), len(ordered)) - 1])


def _numbers(scores: np.ndarray, name: str) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if not scores.size or np.isnan(scores).any():
        raise InputError(
            f"There are {scores.size} scores {name}, {np.isnan(scores).sum()} of them NaN; give inputs, at least one, "
            "for which the network computes numbers."
        )
    return scores


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return Σ_bins n/N |accuracy − confidence| over 15 bins of the confidence (Guo et al., 2017)."""
    confidence, right = (np.asarray(a, np.float64).ravel() for a in (confidence, right))
    which = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    return float(np.abs(np.bincount(which, right - confidence, BINS)).sum() / len(confidence))


@dataclass(frozen=True)
class Usual:
    """What rows of features usually are: their mean, and the inverse of their covariance.

    Attributes:
      columns: of the features, those that are looked at.
      mean: (columns,), float64.
      inverse: (columns, columns).
    """

    columns: np.ndarray
    mean: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Usual":
        """Learn it from rows (n, d): of at most n/4 and at most 512 columns, evenly spaced, so that it is learnable.

        The covariance gets 1e-6 of the mean variance on its diagonal.
        """
        n, d = rows.shape
        count = max(1, min(d, n // _PER_UNIT, _MOST))
        columns = np.linspace(0, d - 1, count).round().astype(int)
        rows = rows[:, columns].astype(np.float64)
        covariance = np.atleast_2d(np.cov(rows.T, bias=True))
        ridge = _RIDGE * np.trace(covariance) / count
        return cls(columns, rows.mean(0), np.linalg.inv(covariance + max(ridge, 1e-30) * np.eye(count)))

    def unlike(self, rows: np.ndarray) -> np.ndarray:
        """Return (x − μ)ᵀ Σ⁻¹ (x − μ) / columns of each row (n, d), about 1 for those that are as usual."""
        off = rows[:, self.columns].astype(np.float64) - self.mean
        return np.sum((off @ self.inverse) * off, -1) / len(self.mean)
