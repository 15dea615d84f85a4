"""A finite feature map of the ⵟ-product: φ(x)·ψ(w) ≈ k(x, w) = (x·w + b)²/(‖x − w‖² + ε), float64.

The numerator is exact: of u, which is x with one more entry, the monomials of degree 2, u_i² and √2 u_i u_j, in number
(d + 1)(d + 2)/2, have the product (u·v)². With √b as that entry on both sides it is one map, φ = ψ, for b ≥ 0; with
1 for x and b for w it takes any b, and of each unit its own. The denominator is a mean over waves,

    1/(D + ε) = ∫ e^{−tε} e^{−tD} dt = E cos(ω·(x − w))/ε,   t ~ Exp(ε), ω ~ N(0, 2t I),

as e^{−tD} is the characteristic function of ω. M waves, a cosine and a sine each, give (d + 1)(d + 2) M features. The
t are stratified: one in each of M equally likely intervals, still unbiased. A cosine is in [−1, 1], so by Hoeffding

    |φ(x)·ψ(w) − k(x, w)| ≤ (x·w + b)²/ε · √(2 ln(2P/δ)/M)

for P pairs at once with probability 1 − δ. For b ≥ 0 (x·w + b)²/ε is at most √(k(x, x) k(w, w)): the error is small
beside the lengths of the features, not beside k(x, w), which is far below them where D ≫ ε.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aether.errors import InputError
from aether.nn import YatNMN


@dataclass(frozen=True)
class FeatureMap:
    """The map: ω (M, d), and whether vectors are made unit vectors first."""

    waves: np.ndarray
    epsilon: float
    spherical: bool = False

    @property
    def size(self) -> int:
        """How many features."""
        m, d = self.waves.shape
        return (d + 1) * (d + 2) * m

    def __call__(self, x: np.ndarray, last: np.ndarray | float) -> np.ndarray:
        """Map rows (n, d) and their further entry, one number or (n,), to features (n, size)."""
        x = self._directed(x)
        monomial, wave = monomials(x, last), self._waves(x)
        return (monomial[:, :, None] * wave[:, None, :]).reshape(len(x), -1)

    def product(self, x: np.ndarray, w: np.ndarray, bias: np.ndarray | float) -> np.ndarray:
        """Return φ(x)·ψ(w), (m, n), of rows with b a number or (n,), without writing the features out."""
        x, w = self._directed(x), self._directed(w)
        return (x @ w.T + bias) ** 2 * (self._waves(x) @ self._waves(w).T)

    def bound(self, x: np.ndarray, w: np.ndarray, bias: np.ndarray | float, delta: float = 0.01) -> np.ndarray:
        """Return what |product − k| exceeds for some pair with a probability of at most δ, (m, n)."""
        peak = (self._directed(x) @ self._directed(w).T + bias) ** 2 / self.epsilon
        return peak * math.sqrt(2.0 * math.log(2.0 * peak.size / delta) / len(self.waves))

    def _directed(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        length = np.linalg.norm(x, axis=-1, keepdims=True) if self.spherical else np.ones((len(x), 1))
        if not np.all(length > 0):
            raise InputError("A zero vector has no direction, so that a spherical layer has no features of it.")
        return x / length

    def _waves(self, x: np.ndarray) -> np.ndarray:
        """Return cosines and sines, (n, 2M)."""
        angle = x @ self.waves.T
        return np.concatenate([np.cos(angle), np.sin(angle)], -1) / math.sqrt(self.epsilon * len(self.waves))


def draw(width: int, waves: int, epsilon: float, *, spherical: bool = False, seed: int = 0) -> FeatureMap:
    """Draw the map of vectors of this width with as many waves."""
    if waves < 1 or not 0 < epsilon < math.inf:
        raise InputError(f"The map has {waves} waves and ε = {epsilon}; it needs 1 or more, and ε above 0.")
    rng = np.random.default_rng(seed)
    t = -np.log1p(-(np.arange(waves) + rng.uniform(size=waves)) / waves) / epsilon
    return FeatureMap(np.sqrt(2.0 * t)[:, None] * rng.normal(size=(waves, width)), epsilon, spherical)


def monomials(x: np.ndarray, last: np.ndarray | float) -> np.ndarray:
    """Return u_i², √2 u_i u_j for i < j, of the rows u = (x, last): (n, (d + 1)(d + 2)/2)."""
    u = np.concatenate([x, np.broadcast_to(last, len(x))[:, None]], -1)
    i, j = np.triu_indices(u.shape[1])
    return u[:, i] * u[:, j] * np.where(i == j, 1.0, math.sqrt(2.0))


@dataclass(frozen=True)
class Linearised:
    """A dense ⵟ layer as a linear map of features: y ≈ φ(x, 1) · weights, weights (features, units)."""

    features: FeatureMap
    weights: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map rows (m, d) to (m, units)."""
        return self.features(x, 1.0) @ self.weights


def linearised(layer: YatNMN, features: FeatureMap) -> Linearised:
    """Return the linear model with the weights α ψ(w_j, b_j).

    Raises:
      InputError: the map is not of this layer's width, ε and geometry.
    """
    w, bias, alpha, epsilon = _parts(layer)
    if (features.waves.shape[1], features.spherical) != (w.shape[1], layer.spherical) or features.epsilon != epsilon:
        had = f"{features.waves.shape[1]} wide with ε = {features.epsilon} and spherical={features.spherical}"
        has = f"{w.shape[1]} wide with ε = {epsilon} and spherical={layer.spherical}"
        raise InputError(f"The map is {had}, and the layer {has}; draw one for it.")
    return Linearised(features, alpha * features(w, bias).T)


def features_of(layer: YatNMN, waves: int, seed: int = 0) -> FeatureMap:
    """Draw the map of a layer's width, ε and geometry."""
    w, _, _, epsilon = _parts(layer)
    return draw(w.shape[1], waves, epsilon, spherical=layer.spherical, seed=seed)


def table(
    layer: YatNMN, x: np.ndarray, counts: Sequence[int], *, delta: float = 0.01, seed: int = 0
) -> list[dict[str, float]]:
    """Return for each number of waves how far the linear model is from the layer on rows x (m, d).

    `error` is ‖ŷ − y‖/‖y‖ over all, `largest` the largest |ŷ − y|, `bound` what that exceeds with a probability of at
    most δ.
    """
    w, bias, alpha, epsilon = _parts(layer)
    rows = []
    for count in counts:
        features = features_of(layer, count, seed)
        points, centres = features._directed(x), features._directed(w)
        apart = np.sum(points**2, -1)[:, None] + np.sum(centres**2, -1) - 2.0 * points @ centres.T
        y = alpha * (points @ centres.T + bias) ** 2 / (np.maximum(apart, 0.0) + epsilon)
        error = np.abs(alpha * features.product(x, w, bias) - y)
        bound = abs(alpha) * np.max(features.bound(x, w, bias, delta))
        numbers: dict[str, Any] = dict(
            waves=count, features=features.size, error=np.linalg.norm(error) / np.linalg.norm(y)
        )
        rows.append({k: float(v) for k, v in (numbers | dict(largest=error.max(), bound=bound)).items()})
    return rows


def _parts(layer: YatNMN) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return the prototypes (n, d), b (n,), α and ε in float64."""
    unit = layer.unit()
    w = np.asarray(layer.prototypes(None, "float32"), np.float64).T
    bias = np.broadcast_to(np.asarray(unit["bias"], np.float64), len(w))
    return w, bias, float(np.squeeze(unit["alpha"])), float(np.squeeze(unit["epsilon"]))
