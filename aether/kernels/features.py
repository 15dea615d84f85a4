"""Feature maps φ of unit vectors with φ(q)·φ(k) ≈ κ(q·k), for attention in linear time.

κ(s) = (s + b)²/(C − 2s), C = 2 + ε, is the spherical ⵟ-product. With r = 2/C and A = (C + 2b)²/4 (partial fractions)

    κ(s) = A/(C − 2s) − (C + 2b)/2 + (C − 2s)/4 = a₀ + a₁s + a₂s² + …,
    a₀ = b²/C, a₁ = (2b + rb²)/C, aₙ = A rⁿ/C for n ≥ 2: none is negative for b ≥ 0, so that κ and its tails are PSD.

The part of degree ≤ 1 takes 1 + d features and is exact in `Taylor` and `Anchored`; the rest is what they differ in.

What no unbiased map can do: K̂ of n unit vectors has rank m, so ‖K̂‖² ≥ (tr K̂)²/m, and the mean square of an unbiased κ̂
over uniform pairs is at least κ(1)²/m whatever the features. With b = 0.1, ε = 0.1, m = 1024 that is 0.38² against the
0.02² of κ itself: good draws are possible only if a few rare ones carry the variance (`Taylor`, `tail_probability`).
"""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aether.kernels.yat import check_epsilon, unit

_JITTER = 1e-5  # of the anchors' Gram matrix, relative to its diagonal
static = partial(field, metadata=dict(static=True))


def kernel(s: Array, bias: float, epsilon: float) -> Array:
    """Return κ(s) = (s + b)²/(2 + ε − 2s)."""
    return (s + bias) ** 2 / (2.0 + epsilon - 2.0 * s)


def coefficients(bias: float, epsilon: float, count: int) -> list[float]:
    """Return the Taylor coefficients a₀ … of κ, `count` of them."""
    c = 2.0 + epsilon
    r = 2.0 / c
    low = [bias**2 / c, (2.0 * bias + r * bias**2) / c]
    return (low + [(c + 2.0 * bias) ** 2 / 4.0 / c * r**n for n in range(2, count)])[:count]


def check(width: int, bias: float, epsilon: float) -> None:
    """Raise a `ValueError` unless width ≥ 2, b ≥ 0 and ε > 0, all finite."""
    if width < 2:
        raise ValueError(f"width is {width}; the head width must be at least 2.")
    if not 0 <= bias < math.inf:
        raise ValueError(f"bias is {bias}; it must be finite and not negative, or κ is not positive semi-definite.")
    check_epsilon(epsilon)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slay:
    """SLAY's features (arXiv 2602.04915): for each quadrature node, (a·[x, √b])² ⊗ exp(√(2τ) w·x − τ).

    Gauss–Laguerre nodes τ discretise 1/(C − 2s) = ∫exp(−τ(C − 2s))dτ (too small for s near 1 with few nodes); positive
    random features (FAVOR+, arXiv 2009.14794), unbiased for exp(2τs); anchors a ~ N(0, I) on the vector extended by √b,
    whose product has the mean ((1 + b)² + 2 (s + b)²)/3 instead of (s + b)². Both are biased; all features are ≥ 0.
    """

    anchors: Array  # (p, d + 1)
    directions: Array  # (r, n, d)
    bias: float = static()
    epsilon: float = static()

    @property
    def floor(self) -> float:
        """Smallest mean weight to divide by: none is needed for positive features."""
        return 0.0

    def __call__(self, x: Array) -> Array:
        """Map unit vectors (..., d) to float32 features (..., r·p·n)."""
        nodes, n, _ = self.directions.shape
        t, weights = np.polynomial.laguerre.laggauss(nodes)
        c = 2.0 + self.epsilon
        tau = jnp.asarray(t / c, jnp.float32)[:, None]
        scale = jnp.asarray(np.sqrt(weights / (3.0 * c * n * len(self.anchors))), jnp.float32)[:, None]
        anchored = (_dot(x, self.anchors[:, :-1]) + self.bias**0.5 * self.anchors[:, -1]) ** 2
        waves = jnp.exp(jnp.sqrt(2.0 * tau) * _dot(x, self.directions) - tau) * scale
        return (waves[..., :, None, :] * anchored[..., None, :, None]).reshape(*x.shape[:-1], -1)


def slay(
    key: Array, width: int, num_features: int, *, bias: float, epsilon: float, nodes: int = 1, anchors: int = 32
) -> Slay:
    """Draw `Slay` features, with orthogonal directions; nodes·anchors must divide `num_features`."""
    check(width, bias, epsilon)
    if num_features < 1 or num_features % (nodes * anchors):
        raise ValueError(
            f"num_features is {num_features} with {nodes} nodes and {anchors} anchors; it must be a multiple of"
            f" {nodes * anchors}."
        )
    first, second = jax.random.split(key)
    n = num_features // (nodes * anchors)
    directions = jax.vmap(lambda k: orthogonal(k, n, width))(jax.random.split(second, nodes))
    return Slay(jax.random.normal(first, (anchors, width + 1)), directions, bias, epsilon)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taylor:
    """The Taylor series of κ: degree ≤ 1 exact, products of rotated coordinates for degree 2, a random tail.

    s² = 1/d + the traceless part, of which y_i² − 1/d and √2 y_i y_j with y = Ux are d(d + 1)/2 features; the mean goes
    to the constant. All of them are exact; fewer are a random orthonormal subset (U is Haar), rescaled: unbiased.
    The tail of degree ≥ 3 is one random wave (or more): 1/(C − 2s) = ∫exp(−τε) exp(−τ‖q − k‖²)dτ is a mixture of
    Gaussians, hence of √2 cos(t w·x + θ) with t² = 2τ, τ ~ Exp(ε), less their Hermite parts of degree ≤ 2.
    A draw has the tail with probability p, 1/p times as strong: the mean over draws is κ exactly. A draw with it is
    useless by itself; one without, and every draw with p = 0, is unbiased for κ cut at degree 2, which differs from κ
    by A r³s³/(C − 2s). Features have both signs; the cut kernel is positive, and exact if all products are there.
    """

    rotation: Array  # (d, d)
    directions: Array  # (n, d)
    frequency: Array  # (n,)
    phase: Array  # (n,)
    strength: Array  # (), √(1/p) or 0
    products: int = static()
    bias: float = static()
    epsilon: float = static()

    @property
    def floor(self) -> float:
        """Smallest mean weight to divide by: a tenth of the mean of κ over random pairs, cut at degree 2."""
        a = coefficients(self.bias, self.epsilon, 3)
        return 0.1 * (a[0] + a[2] / self.rotation.shape[-1])

    def __call__(self, x: Array) -> Array:
        """Map unit vectors (..., d) to float32 features (..., 1 + d + products + n)."""
        d = x.shape[-1]
        a = coefficients(self.bias, self.epsilon, 3)
        constant = jnp.full((*x.shape[:-1], 1), (a[0] + a[2] / d) ** 0.5, jnp.float32)
        parts = [constant, a[1] ** 0.5 * x.astype(jnp.float32), a[2] ** 0.5 * self._products(x)]
        return jnp.concatenate([*parts, self._tail(x)] if len(self.frequency) else parts, -1)

    def _products(self, x: Array) -> Array:
        d = x.shape[-1]
        y = _dot(x, self.rotation)
        parts, share, left = [], 0.0, self.products
        for shift in [*range(1, d // 2 + 1), 0]:
            n = min(left, d // 2 if 2 * shift == d else d)
            if n and shift:
                parts.append(2.0**0.5 * (y * jnp.roll(y, -shift, -1))[..., :n])
                share += n * 2.0 / ((d - 1) * (d + 2))
            elif n:
                parts.append((y * y - 1.0 / d)[..., :n])
                share += n * 2.0 / (d * (d + 2))
            left -= n
        return jnp.concatenate(parts, -1) * share**-0.5

    def _tail(self, x: Array) -> Array:
        y, t, phase = _dot(x, self.directions), self.frequency, self.phase
        sin, cos = jnp.sin(phase), jnp.cos(phase)
        low = cos * (1.0 - 0.5 * t**2 * (y**2 - 1.0)) - t * y * sin
        wave = jnp.cos(t * y + phase) - jnp.exp(-0.5 * t**2) * low
        peak = (2.0 + self.epsilon + 2.0 * self.bias) ** 2 / 4.0 / self.epsilon
        return (2.0 * peak / len(t)) ** 0.5 * self.strength * wave


def taylor(
    key: Array,
    width: int,
    num_features: int,
    *,
    bias: float,
    epsilon: float,
    tail_probability: float = 0.01,
    tail_features: int = 1,
) -> Taylor:
    """Draw `Taylor` features: 1 + width + products + tail_features (none if `tail_probability` is 0) = num_features."""
    check(width, bias, epsilon)
    if not 0 <= tail_probability <= 1:
        raise ValueError(f"tail_probability is {tail_probability}; it must be from 0 to 1.")
    if tail_features < 1:
        raise ValueError(f"tail_features is {tail_features}; it must be at least 1.")
    n = tail_features if tail_probability else 0
    fewest, most = 2 + width + n, 1 + width + width * (width + 1) // 2 + n
    if not fewest <= num_features <= most:
        raise ValueError(f"num_features is {num_features} at width {width}; it must be from {fewest} to {most}.")
    keys = jax.random.split(key, 5)
    hit = jax.random.bernoulli(keys[4], tail_probability)
    return Taylor(
        haar(keys[0], 1, width)[0],
        orthogonal(keys[1], n, width),
        jnp.sqrt(2.0 * jax.random.exponential(keys[2], (n,)) / epsilon),
        jax.random.uniform(keys[3], (n,), maxval=2.0 * math.pi),
        jnp.where(hit, max(tail_probability, 1e-12) ** -0.5, 0.0),
        num_features - 1 - width - n,
        bias,
        epsilon,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Anchored:
    """Nyström features of the remainder ρ(s) = κ(s) − a₀ − a₁s, beside the exact part of degree ≤ 1.

    φ(x) = [√a₀, √a₁ x, L⁻¹ρ(Z x)] with Z the unit anchors and LLᵀ = ρ(ZZᵀ) + jitter: exact at the anchors, and never
    above κ(1) at s = 1. Biased by what the anchors do not span; they are parameters, differentiable, to be taken from
    other data than is attended to (`fit_anchors`). Features have both signs.
    """

    anchors: Array  # Z (m, d)
    inverse: Array  # L⁻¹ (m, m)
    bias: float = static()
    epsilon: float = static()

    @property
    def floor(self) -> float:
        """Smallest mean weight to divide by: a tenth of the mean of κ over random pairs, cut at degree 2."""
        a = coefficients(self.bias, self.epsilon, 3)
        return 0.1 * (a[0] + a[2] / self.anchors.shape[-1])

    def __call__(self, x: Array) -> Array:
        """Map unit vectors (..., d) to float32 features (..., 1 + d + m)."""
        a = coefficients(self.bias, self.epsilon, 2)
        constant = jnp.full((*x.shape[:-1], 1), a[0] ** 0.5, jnp.float32)
        x = x.astype(jnp.float32)  # L⁻¹ would magnify what the products of rounded anchors are off by
        linear = a[1] ** 0.5 * x
        seen = _remainder(_dot(x, self.anchors), self.bias, self.epsilon)
        return jnp.concatenate([constant, linear, _dot(seen, self.inverse)], -1)


def _remainder(s: Array, bias: float, epsilon: float) -> Array:
    """Return ρ(s) = a₂s²/(1 − rs), without cancellation."""
    r = 2.0 / (2.0 + epsilon)
    return coefficients(bias, epsilon, 3)[2] * s * s / (1.0 - r * jnp.minimum(s, 1.0))


def anchored(anchors: Array, *, bias: float, epsilon: float) -> Anchored:
    """Make `Anchored` features of anchors (m, d), of any length but 0.

    For several heads use `jax.lax.map`, not `vmap`: on two cores XLA's CPU client waits for itself, now and then for
    ever, in batches of LAPACK calls (jaxlib 0.10.2).
    """
    if anchors.ndim != 2:
        raise ValueError(f"anchors have shape {anchors.shape}; they must be (number of anchors, head width).")
    check(anchors.shape[1], bias, epsilon)
    anchors, identity = unit(anchors.astype(jnp.float32)), jnp.eye(len(anchors))
    products = jnp.where(identity > 0, 1.0, _dot(anchors, anchors))
    gram = _remainder(products, bias, epsilon)
    rounding = 2.0**-21 / epsilon * math.sqrt(len(anchors))  # near s = 1 the slope of ρ magnifies that of s by 2/ε
    jitter = max(_JITTER, rounding) * _remainder(jnp.ones(()), bias, epsilon)
    factor = jnp.linalg.cholesky(gram + jitter * identity)
    return Anchored(anchors, jax.scipy.linalg.solve_triangular(factor, identity, lower=True), bias, epsilon)


def fit_anchors(key: Array, x: Array, num_anchors: int, iterations: int = 5) -> Array:
    """Choose unit anchors (num_anchors, d) by spherical k-means on vectors x (n, d), which start as a sample of x.

    Use other data than the sequence attended to: an anchor made from it would carry its future into its past.
    """
    if x.ndim != 2 or not 1 <= num_anchors <= len(x):
        raise ValueError(f"num_anchors is {num_anchors} and x {x.shape}; x must be (n, d) with n ≥ num_anchors ≥ 1.")
    x = unit(x.astype(jnp.float32))

    def improve(centres: Array, _: None) -> tuple[Array, None]:
        nearest = jnp.argmax(_dot(x, centres), -1)
        sums = jax.ops.segment_sum(x, nearest, num_anchors)
        return jnp.where(jnp.sum(sums * sums, -1, keepdims=True) > 0, unit(sums), centres), None

    start = x[jax.random.choice(key, len(x), (num_anchors,), replace=False)]
    return jax.lax.scan(improve, start, length=iterations)[0]


def orthogonal(key: Array, count: int, width: int) -> Array:
    """Draw `count` directions from N(0, I), orthogonal within each block of `width` of them."""
    first, second = jax.random.split(key)
    blocks = haar(first, -(-count // width), width).reshape(-1, width)[:count]
    return blocks * jnp.linalg.norm(jax.random.normal(second, (count, width)), axis=-1, keepdims=True)


def haar(key: Array, count: int, width: int) -> Array:
    """Draw `count` matrices (width, width) of orthonormal rows, uniformly, by Gram–Schmidt.

    Not by QR: two batched LAPACK calls at once can wait for each other's threads forever on a CPU of two cores.
    """

    def add(rows: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        i, row = drawn
        for _ in range(2):  # once leaves 1e-7 over the length of what is left
            row = row - jnp.einsum("nrd,nr->nd", rows, jnp.einsum("nrd,nd->nr", rows, row))
            row = unit(row)
        return rows.at[:, i].set(row), None

    rows = jax.random.normal(key, (width, count, width))
    return jax.lax.scan(add, jnp.zeros((count, width, width)), (jnp.arange(width), rows))[0]


def _dot(x: Array, w: Array) -> Array:
    """Return the products of vectors (..., d) with rows (..., n, d) of `w`, in float32."""
    equation = "...d,nd->...n" if w.ndim == 2 else "...d,rnd->...rn"
    return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=jnp.float32, precision="highest")
