"""How much a network's ⵟ units can do: their norms, the spectrum of their centres, a bound on what they fit.

A unit is α k_b(·, w), with k_b(x, w) = (x·w + b)²/(‖x − w‖² + ε), of unit vectors if the layer is spherical. Its size
is measured in the RKHS of k_β, with β the largest |b| of the layer's units: in it

    ‖α k_b(·, w)‖² ≤ α² k_|b|(w, w) = α² (‖w‖² + |b|)²/ε,   with equality for b = β,

so that with one b ≥ 0, as `scalar_bias` or `constant_bias` give it, these are the norms, and else bounds of them. For
b ≥ 0 k_β − k_b is a kernel, and the norm in the space of the larger kernel is the smaller one (Aronszajn, 1950). For
b < 0 k_b = K − L with K = ((x·w)² + b²)/(D + ε) and L = 2|b| x·w/(D + ε), both of them kernels with k_|b| = K + L, in
whose space the squared norm of K(·, w) − L(·, w) is at most K(w, w) + L(w, w).

Papers on ⵟ units take α into the kernel: then a unit is the kernel at its centre, and its squared norm α (‖w‖² + b)²/ε,
`Capacity.papers`. The space changes with α as a layer learns; that of k_β does not, which is why α² is the default.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.errors import InputError
from aether.explain.layers import layers_of, seen
from aether.explain.points import centres_of, directions, points_of
from aether.nn import YatConv, YatNMN


def squared_norms(layer: YatNMN | YatConv) -> Array:
    """Return α² (‖w‖² + |b|)²/ε of each unit, (units,), float32; (layers, units) of layers that are stacked as one."""
    kernel, unit = layer.raw_kernel(), layer.unit()
    square = jnp.sum(kernel**2, tuple(range(-len(layer.kernel_shape), -1)))
    least: Array | float = 0.0
    if layer.spherical or layer.weight_normalized:
        square = (square > 0).astype(jnp.float32)
        least = (
            2.0 - 2.0 * square if layer.spherical else 0.0
        )  # D of a zero vector, which has no direction, from itself
    return unit["alpha"] ** 2 * (square + jnp.abs(unit["bias"])) ** 2 / (least + unit["epsilon"])


def penalty(model: nnx.Module) -> Array:
    """Return the mean of `squared_norms` over each layer's units, summed over the layers; stacked ones count each.

    A mean, since α, ε and a shared b belong to all units of a layer: it moves them alike in a wide and a narrow one.
    """
    norms = (squared_norms(m) for _, m in nnx.iter_modules(model) if isinstance(m, YatNMN | YatConv))
    return sum((jnp.sum(jnp.mean(n, -1)) for n in norms), jnp.zeros(()))


def gram(layer: YatNMN | YatConv, limit: int | None = None) -> np.ndarray:
    """Return k_β(w_i, w_j) of the layer's centres (units, units) in float64, or of `limit` of them, evenly spaced.

    Raises:
      InputError: groups of the units see different channels, so that there is no one kernel.
    """
    _check_groups(layer)
    w = centres_of(layer)
    if limit is not None and limit < len(w):
        w = w[np.linspace(0, len(w) - 1, limit).round().astype(int)]
    dot, square = w @ w.T, np.sum(w**2, -1)
    apart = (2.0 if layer.spherical else square[:, None] + square) - 2.0 * dot
    return (dot + _beta(layer)) ** 2 / (np.maximum(apart, 0.0) + np.asarray(layer.unit()["epsilon"], np.float64))


def effective_rank(eigenvalues: np.ndarray) -> float:
    """Return exp(H(p)), p = λ/Σλ, H the entropy in nats (Roy and Vetterli, 2007); rounding below zero counts as 0."""
    positive = eigenvalues[eigenvalues > 0]
    p = positive / positive.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


@dataclass(frozen=True)
class Bound:
    """B √Σ k_β(x_i, x_i) / n, and what has to hold.

    Attributes:
      value: bounds the empirical Rademacher complexity of all functions of the RKHS of k_β whose norm is at most B.
      radius: B.
      trace: Σ k_β(x_i, x_i).
      samples: n.
      assumptions: sentences.
    """

    value: float
    radius: float
    trace: float
    samples: int
    assumptions: tuple[str, ...]


def rademacher(layer: YatNMN | YatConv, x: np.ndarray, radius: float | None = None) -> Bound:
    """Return the bound of the ball of this radius (Bartlett and Mendelson, 2002, lemma 22), by default the layer's.

    Args:
      layer: whose kernel is meant.
      x: its inputs, (..., d), or what a convolution takes; each row or patch is a sample.
      radius: B; the largest norm of the layer's units by default.

    Raises:
      InputError: as `gram`.
    """
    origin = "is the one given"
    if radius is None:
        radius = float(np.sqrt(np.max(squared_norms(layer))))
        origin = "is read off the trained units: a description, not a guarantee for them"
    _check_groups(layer)
    rows = np.asarray(points_of(layer, x), np.float64)
    rows = directions(rows) if layer.spherical else rows
    square = np.sum(rows**2, -1)
    apart = 2.0 - 2.0 * square if layer.spherical else 0.0
    beta, epsilon = _beta(layer), np.asarray(layer.unit()["epsilon"], np.float64)
    trace = float(np.sum((square + beta) ** 2 / (np.maximum(apart, 0.0) + epsilon)))
    assumptions = (
        f"the functions are those of norm at most {radius:.4g} in the RKHS of the layer's kernel with b = {beta:.4g}",
        f"this radius {origin}",
        "b and ε are taken as fixed before the data, although training may have changed them",
        "the inputs of the layer are independent draws; what earlier layers learned from the same data is not counted",
        *(("neighbouring patches of one image are dependent",) if isinstance(layer, YatConv) else ()),
    )
    return Bound(radius * trace**0.5 / len(rows), radius, trace, len(rows), assumptions)


@dataclass(frozen=True)
class Capacity:
    """What a layer's units can do.

    Attributes:
      norms: α² (‖w‖² + |b|)²/ε of each unit.
      papers: |α| (‖w‖² + |b|)²/ε, with α in the kernel.
      exact: whether the norms are equalities, not upper bounds: one b ≥ 0 for all units.
      beta: the largest |b|.
      eigenvalues: of the Gram matrix of all centres, or of as many as were asked for, in descending order.
      effective_rank: of it, at most their number.
      bound: over the samples, if there were any.
    """

    norms: np.ndarray
    papers: np.ndarray
    exact: bool
    beta: float
    eigenvalues: np.ndarray
    effective_rank: float
    bound: Bound | None

    def summary(self) -> dict[str, float]:
        """Return numbers for a table."""
        n = self.norms
        top = float(self.eigenvalues[0] / self.eigenvalues.sum())
        numbers = dict(units=len(n), total=n.sum(), mean=n.mean(), median=np.median(n), largest=n.max())
        return {k: float(v) for k, v in numbers.items()} | dict(
            centres=float(len(self.eigenvalues)), effective_rank=self.effective_rank, top_share=top
        )


def capacity(layer: YatNMN | YatConv, x: np.ndarray | None = None, limit: int | None = 1024) -> Capacity:
    """Return the capacity of one layer, with the bound over its inputs `x` if they are given.

    The spectrum is that of at most `limit` centres (None: of all, at a cost that grows with their cube).
    """
    norms = np.asarray(squared_norms(layer), np.float64)
    alpha, bias = (np.asarray(layer.unit()[k], np.float64) for k in ("alpha", "bias"))
    eigenvalues = np.linalg.eigvalsh(gram(layer, limit))[::-1]
    return Capacity(
        norms=norms,
        papers=norms / np.abs(np.where(alpha == 0, np.inf, alpha)),
        exact=bool(np.all(bias == bias.max()) and bias.max() >= 0),
        beta=_beta(layer),
        eigenvalues=eigenvalues,
        effective_rank=effective_rank(eigenvalues),
        bound=None if x is None else rademacher(layer, x),
    )


def capacities(model: Any, x: np.ndarray | None = None, limit: int | None = 1024) -> dict[str, Capacity]:
    """Return the capacity of every layer that has prototypes by name, with its bound if the model's inputs are given.

    Raises:
      InputError: there is no such layer.
    """
    layers = {name: layer for name, layer in layers_of(model).items() if isinstance(layer, YatNMN | YatConv)}
    if not layers:
        raise InputError("The network has no ⵟ units with prototypes, whose capacity this is; a ⵟ-MLP has them.")
    inputs = {name: s.x for name, s in seen(model, x).items()} if x is not None else {}
    return {name: capacity(layer, inputs.get(name), limit) for name, layer in layers.items()}


def _beta(layer: YatNMN | YatConv) -> float:
    return float(np.max(np.abs(layer.unit()["bias"])))


def _check_groups(layer: YatNMN | YatConv) -> None:
    groups = layer.groups if isinstance(layer, YatConv) else 1
    if groups > 1:
        raise InputError(f"The layer has {groups} groups of units that see different channels: there is no one kernel.")
