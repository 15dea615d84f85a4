"""The expanded ⵟ-product with its gradient, alone and with the linear map that follows it in an MLP.

Directions are compared by scaling the product, x·w/(‖x‖‖w‖), not the operands. So every form is one product with an
elementwise tail (`aether.kernels.tail`), and what the norms add to the gradients are sums of such tails along rows and
columns. XLA computes both in the loops of the products, which then cost little more than alone.

Axes: x (..., m, d), w (..., d, n), or (..., n, d) if its vectors are rows.
"""

import string
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from aether.kernels.tail import Tail, floor_of, sum_to

TINY = 1e-12  # a vector whose squared norm is not above this has no direction


class Form(NamedTuple):
    """What is known of a ⵟ-product when it is traced.

    Attributes:
      geometry: "point", "direction", or "unit": directions of vectors that are unit vectors already.
      transposed: the vectors of w are its rows.
      nonnegative_bias: see `Tail`.
      dtype: of the result.
    """

    geometry: str
    transposed: bool
    nonnegative_bias: bool
    dtype: jnp.dtype

    def equations(self, x: Array, w: Array) -> tuple[str, str, str]:
        """Return the products x, w -> y; y, w -> x; x, y -> w."""
        rows, vectors = lead_axes(x, w), ("nd" if self.transposed else "dn")
        vectors = vectors if w.ndim == 2 else "..." + vectors
        return f"{rows}d,{vectors}->{rows}n", f"{rows}n,{vectors}->{rows}d", f"{rows}d,{rows}n->{vectors}"

    def operands(self, x: Array, w: Array) -> "Operands":
        """Return what the tail has to know of x and w."""
        if self.geometry == "unit":
            return Operands(Tail(self.nonnegative_bias, x.dtype, floor_of(x.dtype, unit=True)), 2.0)
        tail = Tail(self.nonnegative_bias, x.dtype)
        x_square, w_square = squares(x, -1)[..., :, None], squares(w, -1 if self.transposed else -2)[..., None, :]
        if self.geometry == "point":
            return Operands(tail, x_square + w_square)
        scales = (jnp.where(s > TINY, jax.lax.rsqrt(jnp.maximum(s, TINY)), 0.0) for s in (x_square, w_square))
        return Operands(tail, 2.0, *scales)


class Operands(NamedTuple):
    """S, and the factors that x·w is multiplied by: inverse norms, 0 of a vector that has no direction."""

    tail: Tail
    s: Any
    x_scale: Any = 1.0
    w_scale: Any = 1.0


def lead_axes(x: Array, w: Array) -> str:
    """Name the axes of x before its last: one by one if w has none of them, so that a product can sum over all."""
    return string.ascii_uppercase[: x.ndim - 1] if w.ndim == 2 else "...m"


def squares(x: Array, axis: int | tuple[int, ...], *, keepdims: bool = False) -> Array:
    """Return ‖x‖² along `axis` in float32."""
    x = x.astype(jnp.float32)
    return jnp.sum(x * x, axis, keepdims=keepdims)


def multiply(equation: str, x: Array, w: Array, dtype: Any = jnp.float32) -> Array:
    """Return einsum(equation, x, w), accumulated in float32; float32 operands are multiplied as such."""
    return jnp.einsum(equation, x, w, preferred_element_type=dtype, precision="highest")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def unit_product(form: Form, x: Array, w: Array, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """Return α (x·w + b)² / (D + ε); b, α and ε are float32 and broadcast to the result."""
    ops = form.operands(x, w)
    return (alpha * ops.tail.respond(_dot(form, ops, x, w), ops.s, bias, epsilon)[0]).astype(form.dtype)


def _dot(form: Form, ops: Operands, x: Array, w: Array) -> Array:
    return multiply(form.equations(x, w)[0], x, w) * (ops.x_scale * ops.w_scale)


def _keep(form: Form, x: Array, w: Array, bias: Array, epsilon: Array) -> tuple[Operands, Array, Array]:
    """Return what the tail knows, u, and what is kept."""
    ops = form.operands(x, w)
    u, kept = ops.tail.respond(_dot(form, ops, x, w), ops.s, bias, epsilon)
    if w.ndim == 2:  # a remat policy may save it: it is all of the product, and of the hidden units
        kept = checkpoint_name(checkpoint_name(kept, "product"), "hidden")
    return ops, u, kept


def _unit_forward(form, x, w, bias, alpha, epsilon):
    ops, u, kept = _keep(form, x, w, bias, epsilon)
    if jnp.finfo(form.dtype).bits <= jnp.finfo(x.dtype).bits:  # else y is not to lose what u loses when it is kept
        kept = jax.lax.optimization_barrier(kept)  # lest XLA compute the product twice, for this and for y
        u = ops.tail.response(kept, ops.s, bias, epsilon).astype(jnp.float32)
    return (alpha * u).astype(form.dtype), (x, w, bias, alpha, epsilon, kept)


def _unit_backward(form, residuals, g):
    x, w, bias, alpha, epsilon, kept = residuals
    ops, g = form.operands(x, w), g.astype(jnp.float32)
    d_alpha = sum_to(g * ops.tail.response(kept, ops.s, bias, epsilon).astype(jnp.float32), alpha.shape)
    d_x, d_w, d_bias, d_epsilon = _pull(form, ops, x, w, bias, epsilon, kept, g * alpha)
    return d_x, d_w, d_bias, d_alpha, d_epsilon


unit_product.defvjp(_unit_forward, _unit_backward)


def _pull(
    form: Form, ops: Operands, x: Array, w: Array, bias: Array, epsilon: Array, kept: Array, g: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of x, w, b and ε where that of u is `g`."""
    u, t, free = ops.tail.recover(kept, ops.s, bias, epsilon)
    of_n = 2.0 * g * t
    of_q = -0.5 * of_n * t
    spread = 1.0 + free  # of_dot = of_n · spread
    of_product = (of_n * spread * (ops.x_scale * ops.w_scale)).astype(x.dtype)
    _, to_x, to_w = form.equations(x, w)
    d_x, d_w = multiply(to_x, of_product, w, x.dtype), multiply(to_w, x, of_product, x.dtype)  # a mesh sums these
    # What the norms add, a multiple of each vector: S grows by 2x; a direction loses what points along it.
    if form.geometry != "unit":
        along = -of_n * free if form.geometry == "point" else 2.0 * g * spread * (bias * t - u)
        by_row, by_column = jnp.sum(along, -1, keepdims=True), jnp.sum(along, -2, keepdims=True)
        if form.geometry == "direction":
            by_row = by_row * ops.x_scale**2
            by_column = sum_to(by_column, ops.w_scale.shape) * ops.w_scale**2
        d_x = d_x + by_row * x
        by_column = sum_to(by_column, (*w.shape[:-2], 1, by_column.shape[-1]))
        d_w = sum_to(d_w, w.shape) + (by_column.swapaxes(-1, -2) if form.transposed else by_column) * w
    of_x, of_w = sum_to(d_x, x.shape).astype(x.dtype), sum_to(d_w, w.shape).astype(w.dtype)
    return of_x, of_w, sum_to(of_n, bias.shape), sum_to(of_q, epsilon.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def unit_mlp(form: Form, x: Array, w: Array, out: Array, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """Return unit_product(x, w) @ out, w (d, n) and out (n, e), α one number."""
    return _mlp_forward(form, x, w, out, bias, alpha, epsilon)[0]


def _mlp_forward(form, x, w, out, bias, alpha, epsilon):
    ops, _, kept = _keep(form, x, w, bias, epsilon)
    u = ops.tail.response(kept, ops.s, bias, epsilon)
    y = alpha * jnp.einsum("...n,ne->...e", u, out)
    return y.astype(form.dtype), (x, w, out, bias, alpha, epsilon, kept)


def _mlp_backward(form, residuals, g):
    x, w, out, bias, alpha, epsilon, kept = residuals
    ops = form.operands(x, w)
    u = ops.tail.response(kept, ops.s, bias, epsilon)
    rows = lead_axes(x, w)
    of_out = jnp.einsum(f"{rows}n,{rows}e->ne", u, g).astype(jnp.float32)
    d_alpha = jnp.sum(of_out * out)  # = Σ g · (u @ out)
    of_u = alpha * jnp.einsum("...e,ne->...n", g, out, preferred_element_type=jnp.float32)
    d_x, d_w, d_bias, d_epsilon = _pull(form, ops, x, w, bias, epsilon, kept, of_u)
    return d_x, d_w, (alpha * of_out).astype(out.dtype), d_bias, d_alpha.reshape(alpha.shape), d_epsilon


unit_mlp.defvjp(_mlp_forward, _mlp_backward)
