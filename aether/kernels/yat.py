"""The ⵟ-product: a matrix product whose entries are kernel values.

`y = α (x·w + b)² / (D + ε)`, `D = max(‖x‖² + ‖w‖² − 2 x·w, 0)`  (nmn; arXiv 2410.09118 for the idea)

Operands stay in the compute dtype, products accumulate in float32. The backward pass keeps, beside its operands, one
number per output (`aether.kernels.tail`).

The expanded distance loses ‖x − w‖² where x is near w: its relative error is about κ = S/(D + ε) roundings, with
S = ‖x‖² + ‖w‖²: harmless for unit vectors with ε ≥ 0.1 and for layers at their start, not for a trained prototype that
sits on its data with ε ≤ 1e-3. What it cannot resolve (below four roundings of S) is taken as that much: zero would
overrate y by up to D/ε. `ill_conditioned` counts the pairs with a large κ; `distance="exact"` takes differences
instead, at m·n·d operations outside the matrix unit, and is also the form to differentiate twice.
"""

import math
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aether.kernels.dense import TINY, Form, squares, unit_mlp, unit_product

_BLOCK = 16  # entries of the vectors whose differences are squared at a time
_LEAST = 2.0**-126  # the least normal number in float32
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


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Return x/‖x‖ along `axis`, in x's dtype, the norm taken in float32; 0 stays 0 with a finite gradient.

    The backward pass needs the result, which what follows keeps in any case, and one number a vector.
    """
    return _unit_forward(x, axis)[0]


def _unit_forward(x, axis):
    inverse = jax.lax.rsqrt(jnp.maximum(squares(x, axis, keepdims=True), TINY))
    y = (x.astype(jnp.float32) * inverse).astype(x.dtype)
    return y, (y, inverse)


def _unit_backward(axis, residuals, g):
    y, inverse = (a.astype(jnp.float32) for a in residuals)
    g = g.astype(jnp.float32)
    along = jnp.where(inverse < TINY**-0.5, jnp.sum(g * y, axis, keepdims=True), 0.0)
    return (((g - along * y) * inverse).astype(residuals[0].dtype),)


unit.defvjp(_unit_forward, _unit_backward)


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
    if distance == "exact":
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        if spherical and not normalized:
            x, w = _unit_forward(x, -1)[0], _unit_forward(w, axis)[0]
        rows = w if transposed else w.swapaxes(-1, -2)
        d = squared_distances(x, rows)
        if spherical:
            d += _missing(x)[..., :, None] + _missing(rows)[..., None, :]
        equation = "...md,...nd->...mn" if transposed else "...md,...dn->...mn"
        return ratio_of(jnp.einsum(equation, x, w, precision="highest"), d, *parts).astype(dtype)
    geometry = ("unit" if normalized else "direction") if spherical else "point"
    return unit_product(Form(geometry, transposed, nonnegative_bias, dtype), x, w, *parts)


def yat_mlp(
    x: Array,
    w: Array,
    out: Array,
    *,
    bias: Array | float = 0.0,
    alpha: Array | float = 1.0,
    epsilon: Array | float = 1e-5,
    spherical: bool = False,
    nonnegative_bias: bool = True,
) -> Array:
    """Return yat(x, w) @ out, by the expanded distance, with one gradient that keeps u alone of the hidden width.

    The linear map needs y = α |u| for its gradient, which u gives.

    Args:
      x: (..., m, d).
      w: (d, n), of x's dtype.
      out: (n, e), of x's dtype.
      bias: b, a number, (1,) or (n,).
      alpha: α, one number.
      epsilon: ε > 0, one number.
      spherical: compare directions only.
      nonnegative_bias: promise that b ≥ 0; else the float32 dot product is kept in u's place.

    Returns:
      (..., m, e) in x's dtype, accumulated in float32.

    Raises:
      ValueError: dtypes or sizes differ, α or ε is not one number, or ε is a number ≤ 0.
    """
    if not x.dtype == w.dtype == out.dtype:
        raise ValueError(f"x, w and out are {x.dtype}, {w.dtype} and {out.dtype}; cast all to the compute dtype.")
    if x.ndim < 2 or w.ndim != 2 or out.ndim != 2 or (x.shape[-1], w.shape[1]) != (w.shape[0], out.shape[0]):
        shapes = f"x, w and out are {x.shape}, {w.shape} and {out.shape}"
        raise ValueError(f"{shapes}; they must be (..., m, d), (d, n) and (n, e).")
    check_epsilon(epsilon)
    if jnp.size(alpha) != 1 or jnp.size(epsilon) != 1:
        raise ValueError(f"alpha is {jnp.shape(alpha)} and epsilon {jnp.shape(epsilon)}; both must be one number.")
    if jnp.shape(bias) not in ((), (1,), (w.shape[1],)):
        raise ValueError(f"bias is {jnp.shape(bias)}; it must be one number or ({w.shape[1]},), one a hidden unit.")
    parts = tuple(jnp.asarray(p, jnp.float32) for p in (bias, alpha, epsilon))
    form = Form("direction" if spherical else "point", False, nonnegative_bias, x.dtype)
    return unit_mlp(form, x, w, out, *parts)


def ill_conditioned(x: Array, w: Array, epsilon: Array | float, threshold: float = 1e3) -> Array:
    """Count the pairs of rows of `x` (m, d) and columns of `w` (d, n) with κ = (‖x‖² + ‖w‖²)/(D + ε) > `threshold`.

    About κ float32 roundings (6e-8) is the relative error of y by the expanded distance; D is taken by differences.
    """
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    d = squared_distances(x, w.T)
    return jnp.sum((squares(x, -1)[:, None] + squares(w, 0)) > threshold * (d + epsilon))


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


def _missing(x: Array) -> Array:
    """Return what squares of unit vectors lack of 1: something for vectors near 0 alone, so that D = 2 there too."""
    square = squares(x, -1)
    return jnp.where(square < 0.5, 1.0 - square, 0.0)
