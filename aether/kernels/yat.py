"""The ⵟ-product, the only place where it is written: a matrix product whose entries are kernel values.

`y = α (x·w + b)² / (D + ε)`, `D = max(‖x‖² + ‖w‖² − 2 x·w, 0)`  (nmn; arXiv 2410.09118 for the idea)

Operands stay in the compute dtype, products accumulate in float32. The backward pass keeps, beside its operands, one
number per output: u = y/α with the sign of n = x·w + b in its sign bit. Since D = S + 2b − 2n with S = ‖x‖² + ‖w‖²,
n is a root of n² + 2un − u(S + 2b + ε) = 0, and the sign says which. Rounding u to bfloat16 costs less accuracy than
rounding the dot product: the error of n is that of u divided by 2 + 2n/Q. Where b may be negative the root is not
determined, and the float32 dot product is kept instead.

The expanded distance loses ‖x − w‖² where x is near w: its relative error is about κ = S/(D + ε) roundings, harmless
for unit vectors with ε ≥ 0.1 and for layers at their start, not for a trained prototype that sits on its data with
ε ≤ 1e-3. What it cannot resolve (below four roundings of S) is taken as that much: zero would overrate y by up to D/ε.
`ill_conditioned` counts the pairs with a large κ; `distance="exact"` takes differences instead, at m·n·d operations
outside the matrix unit, and is also the form to differentiate twice.
"""

import math
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_TINY = 1e-12  # squared norms below this are not stretched to a unit vector
_BLOCK = 16  # entries of the vectors whose differences are squared at a time
_LEAST = 2.0**-126  # the least normal number in float32
_FLOOR = 4 * 2.0**-23  # of S: what float32 sums resolve
DISTANCES = ("expanded", "exact")


def check_epsilon(epsilon: Any) -> None:
    """Raise a `ValueError` if ε is a number and not a positive finite one in float32; arrays pass."""
    if isinstance(epsilon, Array | np.ndarray):
        return
    if not isinstance(epsilon, Real) or not (_LEAST <= float(epsilon) < math.inf):
        raise ValueError(f"epsilon is {epsilon!r}; it must be a positive finite number, such as 1e-5.")


def check_distance(distance: str) -> str:
    """Return `distance` if there is such a form; ValueError otherwise."""
    if distance not in DISTANCES:
        raise ValueError(f"distance is {distance!r}; it must be one of {', '.join(DISTANCES)}.")
    return distance


def unit(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Return x/‖x‖ along `axis`, in x's dtype, the norm taken in float32; 0 stays 0 with a finite gradient."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.maximum(jnp.sum(x32 * x32, axis, keepdims=True), _TINY))).astype(x.dtype)


def yat(
    x: Array,
    w: Array,
    *,
    bias: Array | float = 0.0,
    alpha: Array | float = 1.0,
    epsilon: Array | float = 1e-5,
    spherical: bool = False,
    normalized: bool = False,
    transposed: bool = False,
    nonnegative_bias: bool = True,
    distance: str = "expanded",
    dtype: jnp.dtype | None = None,
) -> Array:
    """Return the ⵟ-product of the rows of `x` with the columns of `w`, or with its rows if `transposed`.

    y[i, j] = α (x_i·w_j + b)² / (max(‖x_i‖² + ‖w_j‖² − 2 x_i·w_j, 0) + ε), of unit vectors if `spherical`.

    Args:
      x: (..., m, d).
      w: (..., d, n), or (..., n, d) if `transposed`, of x's dtype; leading axes broadcast against x's.
      bias: b, broadcastable to the output.
      alpha: α, broadcastable to the output.
      epsilon: ε > 0, broadcastable to the output.
      spherical: compare directions only; the distance is then 2 − 2 cos.
      normalized: with `spherical`: they are unit vectors already, as keys in a cache are.
      transposed: the vectors of `w` are its rows, as keys are in attention.
      nonnegative_bias: promise that b ≥ 0, which lets the backward pass keep u instead of the float32 dot product.
      distance: "expanded", or "exact": Σ(x − w)² for vectors close to one another (see above), all in float32.
      dtype: of the result; x's by default.

    Returns:
      (..., m, n). Gradients are those of the formula, with a zero derivative of the distance where it is clamped.
      Second derivatives are right in float32 except where n = 0; "exact" is right there too. It alone takes forward
      mode (`jax.jvp`, `jax.hessian`).

    Raises:
      ValueError: the operands' dtypes or inner sizes differ, ε is a number ≤ 0, or `distance` is neither.
    """
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w {w.dtype}; cast both to the compute dtype.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x and w are {x.dtype}; they must be of a floating dtype.")
    if min(x.ndim, w.ndim) < 2:
        raise ValueError(f"x is {x.shape} and w {w.shape}; both must have at least two axes.")
    check_epsilon(epsilon)
    axis = -1 if transposed else -2
    if x.shape[-1] != w.shape[axis]:
        raise ValueError(f"x has vectors of {x.shape[-1]} and w of {w.shape[axis]}; they must be equal.")
    check_distance(distance)
    parts = tuple(jnp.asarray(p, jnp.float32) for p in (bias, alpha, epsilon))
    dtype = jnp.dtype(dtype or x.dtype)
    exact = distance == "exact"
    if exact:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if spherical and not normalized:
        x, w = unit(x), unit(w, axis)
    equation = "...md,...nd->...mn" if transposed else "...md,...dn->...mn"
    if exact:
        rows = w if transposed else w.swapaxes(-1, -2)
        d = squared_distances(x, rows)
        if spherical:
            d += _missing(x)[..., :, None] + _missing(rows)[..., None, :]
        return ratio_of(jnp.einsum(equation, x, w, precision="highest"), d, *parts).astype(dtype)
    dot = product(equation, x, w)
    if w.ndim == 2:
        dot = checkpoint_name(dot, "product")  # which a remat policy may keep
    squares = (2.0, 0.0) if spherical else (_squares(x, -1)[..., :, None], _squares(w, axis)[..., None, :])
    floor = floor_of(x.dtype, spherical)
    return ratio(dot, *squares, *parts, nonnegative_bias=nonnegative_bias, floor=floor, kept=x.dtype, dtype=dtype)


def floor_of(dtype: jnp.dtype, spherical: bool) -> float:
    """Return the least distance that an expansion resolves, in parts of S = ‖x‖² + ‖w‖², for vectors of this dtype."""
    return max(_FLOOR, float(jnp.finfo(dtype).eps) / 20) if spherical else _FLOOR  # unit vectors have been rounded


def ill_conditioned(x: Array, w: Array, epsilon: Array | float, threshold: float = 1e3) -> Array:
    """Count the pairs of rows of `x` (m, d) and columns of `w` (d, n) with κ = (‖x‖² + ‖w‖²)/(D + ε) > `threshold`.

    About κ float32 roundings (6e-8) is the relative error of y by the expanded distance; D is taken by differences.
    """
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    d = squared_distances(x, w.T)
    return jnp.sum((_squares(x, -1)[:, None] + _squares(w, 0)) > threshold * (d + epsilon))


def squared_distances(x: Array, w: Array) -> Array:
    """Return ‖x_i − w_j‖² by differences, (..., m, n), of rows (..., m, d) and (..., n, d), in x's dtype.

    No intermediate, in the backward pass either, is larger than a few entries of the vectors times the result.
    """
    d = x.shape[-1]
    block = min(d, _BLOCK)

    def blocks(v: Array) -> Array:
        v = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, -d % block)])
        return jnp.moveaxis(v.reshape(*v.shape[:-1], -1, block), -2, 0)

    @jax.checkpoint
    def add(total: Array, vectors: tuple[Array, Array]) -> tuple[Array, None]:
        x, w = vectors
        return total + jnp.sum((x[..., :, None, :] - w[..., None, :, :]) ** 2, -1), None

    lead = jnp.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    zeros = jnp.zeros((*lead, x.shape[-2], w.shape[-2]), x.dtype)
    return jax.lax.scan(add, zeros, (blocks(x), blocks(w)))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: Array, w: Array) -> Array:
    """Return einsum(equation, x, w) in float32; its cotangent is rounded to the operands' dtype, then multiplied.

    Float32 operands are multiplied as such: the bfloat16 or TF32 passes that accelerators put in would lose distances.
    """
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32, precision="highest")


def _product_forward(equation, x, w):
    return product(equation, x, w), (x, w)


def _product_backward(equation, operands, g):
    x, w = operands
    multiply = partial(jnp.einsum, equation, preferred_element_type=x.dtype, precision="highest")
    g = g.astype(x.dtype)
    return *jax.linear_transpose(lambda x: multiply(x, w), x)(g), *jax.linear_transpose(lambda w: multiply(x, w), w)(g)


product.defvjp(_product_forward, _product_backward)


def ratio_of(dot: Array, distance: Array, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """Return α (dot + b)² / (distance + ε), differentiated by JAX."""
    return alpha * (dot + bias) ** 2 / (distance + epsilon)


def ratio(
    dot: Array,
    x_square: Array | float,
    w_square: Array | float,
    bias: Array,
    alpha: Array,
    epsilon: Array,
    *,
    nonnegative_bias: bool,
    floor: float = _FLOOR,
    kept: jnp.dtype,
    dtype: jnp.dtype,
) -> Array:
    """Return α (dot + b)² / (max(S − 2 dot, floor·S) + ε), S = ‖x‖² + ‖w‖²; its gradient keeps one number an output.

    Args:
      dot: x·w, float32.
      x_square: ‖x‖², broadcastable to `dot`.
      w_square: ‖w‖², broadcastable to `dot`.
      bias: b, broadcastable to `dot`, as are α and ε.
      alpha: α.
      epsilon: ε.
      nonnegative_bias: keep the signed u in `kept`, else `dot` itself.
      floor: the rounding error of the distance, in parts of S.
      kept: the compute dtype.
      dtype: of the result.
    """
    options = Options(nonnegative_bias, floor, jnp.dtype(kept), jnp.dtype(dtype))
    squares = (jnp.asarray(s, jnp.float32) for s in (x_square, w_square))
    return _ratio(options, dot, *squares, bias, alpha, epsilon)


class Options(NamedTuple):
    """What is known of a ratio when it is traced."""

    nonnegative_bias: bool
    floor: float
    kept: jnp.dtype
    dtype: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ratio(o, dot, x_square, w_square, bias, alpha, epsilon):
    return _forward(o, dot, x_square, w_square, bias, alpha, epsilon)[0]


def _missing(x: Array) -> Array:
    """Return what squares of unit vectors lack of 1: something for vectors near 0 alone, so that D = 2 there too."""
    square = _squares(x, -1)
    return jnp.where(square < 0.5, 1.0 - square, 0.0)


def _squares(x: Array, axis: int) -> Array:
    x = x.astype(jnp.float32)
    return jnp.sum(x * x, axis)


def _forward(o, dot, x_square, w_square, bias, alpha, epsilon):
    n, s = dot + bias, x_square + w_square
    u = n * n / (jnp.maximum(s - 2.0 * dot, o.floor * s) + epsilon)
    kept = jnp.where(n < 0, -u, u).astype(o.kept) if o.nonnegative_bias else dot
    return (alpha * u).astype(o.dtype), (kept, x_square, w_square, bias, alpha, epsilon)


def _recover(kept, s, bias, epsilon, least):
    """Return (n, Q, u, distance not clamped) from u with the sign of n; `least` is the least distance."""
    signed = kept.astype(jnp.float32)
    u = jnp.abs(signed)
    c = s + 2.0 * bias + epsilon
    root, other = jnp.sqrt(u), jnp.sqrt(u + c)  # never √(u(u + c)), which overflows
    positive = root * c / (root + other)  # = root (other − root) without its cancellation
    edge = 0.5 * (s - least) + bias  # n at which the distance reaches `least`
    clamped = least + epsilon
    free = (signed < 0) | (u * clamped < edge * edge)
    n = jnp.where(signed < 0, -root * (root + other), jnp.where(free, positive, root * jnp.sqrt(clamped)))
    q = jnp.where(free, jnp.where(u > 1e-30, n * (n / jnp.maximum(u, 1e-30)), c), clamped)
    return n, q, u, free


def _backward(o, residuals, g):
    kept, x_square, w_square, bias, alpha, epsilon = residuals
    s = x_square + w_square
    if o.nonnegative_bias:
        n, q, u, free = _recover(kept, s, bias, epsilon, o.floor * s)
    else:
        n, raw = kept + bias, s - 2.0 * kept
        free = raw > o.floor * s
        q = jnp.maximum(raw, o.floor * s) + epsilon
        u = n * n / q
    g = g.astype(jnp.float32)
    ga = g * alpha
    g_n = 2.0 * ga * (n / q)
    g_q = -ga * (u / q)
    g_distance = jnp.where(free, g_q, 0.0)
    parts = ((g_distance, x_square), (g_distance, w_square), (g_n, bias), (g * u, alpha), (g_q, epsilon))
    return g_n - 2.0 * g_distance, *(_sum_to(g, p.shape) for g, p in parts)


def _sum_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum `g` over the axes along which an operand of `shape` was broadcast."""
    g = jnp.sum(g, tuple(range(g.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and g.shape[i] != 1)
    return jnp.sum(g, axes, keepdims=True)


_ratio.defvjp(_forward, _backward)
