"""The ⵟ-product, the only place where it is written: a matrix product whose entries are kernel values.

`y = α (x·w + b)² / (max(‖x‖² + ‖w‖² − 2 x·w, 0) + ε)`  (nmn; arXiv 2410.09118 for the idea)

Operands stay in the compute dtype, products accumulate in float32. The backward pass keeps, beside its operands, one
number per output: u = y/α with the sign of n = x·w + b in its sign bit. Since D = S + 2b − 2n with S = ‖x‖² + ‖w‖²,
n is a root of n² + 2un − u(S + 2b + ε) = 0, and the sign says which. Rounding u to bfloat16 costs less accuracy than
rounding the dot product: the error of n is that of u divided by 2 + 2n/Q. Where b may be negative the root is not
determined, and the float32 dot product is kept instead.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_TINY = 1e-12  # squared norms below this are not stretched to a unit vector


def unit(x: Array, axis: int = -1) -> Array:
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
      dtype: of the result; x's by default.

    Returns:
      (..., m, n). Gradients are those of the formula, with a zero derivative of the distance where it is clamped.
      Second derivatives are right in float32 except where n = 0; for those use plain autodiff on `yat_reference`.

    Raises:
      ValueError: the operands' dtypes or inner sizes differ.
    """
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w {w.dtype}; cast both to the compute dtype.")
    axis = -1 if transposed else -2
    if x.shape[-1] != w.shape[axis]:
        raise ValueError(f"x has vectors of {x.shape[-1]} and w of {w.shape[axis]}; they must be equal.")
    if spherical and not normalized:
        x, w = unit(x), unit(w, axis)
    bias, alpha, epsilon = (jnp.asarray(p, jnp.float32) for p in (bias, alpha, epsilon))
    options = Options(spherical, transposed, nonnegative_bias, jnp.dtype(dtype or x.dtype))
    return _yat(options, x, w, bias, alpha, epsilon)


def yat_reference(x: Array, w: Array, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """Return the plain ⵟ-product by direct differences, (..., m, n): the memory is m·d·n; for tests and small sizes."""
    dot = jnp.matmul(x, w)
    distance = jnp.sum((x[..., :, :, None] - w[..., None, :, :]) ** 2, -2)
    return alpha * (dot + bias) ** 2 / (distance + epsilon)


class Options(NamedTuple):
    """What is known when the product is traced."""

    spherical: bool
    transposed: bool
    nonnegative_bias: bool
    dtype: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _yat(o, x, w, bias, alpha, epsilon):
    return _forward(o, x, w, bias, alpha, epsilon)[0]


def _product(o: Options, x: Array, w: Array, dtype: jnp.dtype) -> Array:
    equation = "...md,...nd->...mn" if o.transposed else "...md,...dn->...mn"
    return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def _squares(o: Options, x: Array, w: Array) -> Array | float:
    """Return S = ‖x‖² + ‖w‖², broadcastable to the output; exactly 2 for unit vectors."""
    if o.spherical:
        return 2.0
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.sum(x * x, -1)[..., :, None] + jnp.sum(w * w, -1 if o.transposed else -2)[..., None, :]


def _forward(o, x, w, bias, alpha, epsilon):
    dot = _product(o, x, w, jnp.dtype("float32"))
    n = dot + bias
    u = n * n / (jnp.maximum(_squares(o, x, w) - 2.0 * dot, 0.0) + epsilon)
    kept = jnp.where(n < 0, -u, u).astype(x.dtype) if o.nonnegative_bias else dot
    return (alpha * u).astype(o.dtype), (kept, x, w, bias, alpha, epsilon)


def _recover(kept, s, bias, epsilon):
    """Return (n, Q, u, distance not clamped) from u with the sign of n."""
    signed = kept.astype(jnp.float32)
    u = jnp.abs(signed)
    c = s + 2.0 * bias + epsilon
    root = jnp.sqrt(u * (u + c))
    positive = u * c / jnp.maximum(u + root, 1e-37)  # = −u + root without its cancellation
    edge = 0.5 * (c - epsilon)  # n at which the distance reaches 0
    free = (signed < 0) | (u * epsilon < edge * edge)
    n = jnp.where(signed < 0, -(u + root), jnp.where(free, positive, jnp.sqrt(u * epsilon)))
    q = jnp.where(free, jnp.where(u > 1e-30, n * n / jnp.maximum(u, 1e-30), c), epsilon)
    return n, q, u, free


def _backward(o, residuals, g):
    kept, x, w, bias, alpha, epsilon = residuals
    s = _squares(o, x, w)
    if o.nonnegative_bias:
        n, q, u, free = _recover(kept, s, bias, epsilon)
    else:
        n, raw = kept + bias, s - 2.0 * kept
        free = raw > 0
        q = jnp.maximum(raw, 0.0) + epsilon
        u = n * n / q
    g = g.astype(jnp.float32)
    ga = g * alpha
    g_n = 2.0 * ga * n / q
    g_q = -ga * u / q
    g_distance = jnp.where(free, g_q, 0.0)
    g_dot = (g_n - 2.0 * g_distance).astype(x.dtype)
    g_x, g_w = jax.vjp(lambda x, w: _product(o, x, w, x.dtype), x, w)[1](g_dot)
    if not o.spherical:
        g_x += (2.0 * x * _sum_to(jnp.sum(g_distance, -1, keepdims=True), x.shape[:-1] + (1,))).astype(x.dtype)
        for_w = jnp.sum(g_distance, -2, keepdims=True)
        for_w = for_w.swapaxes(-1, -2) if o.transposed else for_w
        vectors = w.shape[:-1] + (1,) if o.transposed else w.shape[:-2] + (1, w.shape[-1])
        g_w += (2.0 * w * _sum_to(for_w, vectors)).astype(w.dtype)
    return g_x, g_w, _sum_to(g_n, bias.shape), _sum_to(g * u, alpha.shape), _sum_to(g_q, epsilon.shape)


def _sum_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum `g` over the axes along which an operand of `shape` was broadcast."""
    g = jnp.sum(g, tuple(range(g.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and g.shape[i] != 1)
    return jnp.sum(g, axes, keepdims=True)


_yat.defvjp(_forward, _backward)
