"""Convolutions of ⵟ units: the ⵟ-product of every patch with every kernel.

`y = α (p·w + b)² / (max(‖p‖² + ‖w‖² − 2 p·w, 0) + ε)` for each patch p; the zeros of padding and of dilation are
entries of the patch, and the kernel counts whole. p·w is one convolution; ‖p‖² is the channel sum of x², summed over
the window, so no second convolution is needed. The backward pass keeps one number an output (`aether.kernels.tail`)
beside x and w, of which it takes the squares again.
"""

import math
from functools import partial
from typing import NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array, lax

from aether.kernels.dense import TINY, squares
from aether.kernels.tail import Tail, sum_to
from aether.kernels.window import Padding, Sizes, Window, conv_window, transposed_window
from aether.kernels.yat import check_distance, check_epsilon, ratio_of, squared_distances


class Unit(TypedDict, total=False):
    """What the unit makes of a patch; defaults are those of `aether.kernels.yat.yat`."""

    bias: Array | float
    """b: a number, (1,) or (out,), as are α and ε."""
    alpha: Array | float
    """α."""
    epsilon: Array | float
    """ε > 0."""
    spherical: bool
    """Compare directions only: patch and kernel as unit vectors, D = 2 − 2 cos; a zero patch stays zero."""
    nonnegative_bias: bool
    """Promise that b ≥ 0, which lets the backward pass keep y with a sign instead of the float32 dot product."""
    distance: str
    """The form of ‖p − w‖²: "expanded", or "exact", by differences: see `yat` for when."""
    dtype: jnp.dtype | None
    """Of the result; x's by default."""


def yat_conv(
    x: Array,
    w: Array,
    *,
    strides: Sizes | None = 1,
    padding: Padding = "SAME",
    input_dilation: Sizes | None = 1,
    kernel_dilation: Sizes | None = 1,
    feature_group_count: int = 1,
    **unit: Unpack[Unit],
) -> Array:
    """Return the ⵟ-product of every patch of `x` with every kernel of `w`.

    Args:
      x: (b, spatial..., in).
      w: (k..., in / groups, out), of x's dtype.
      strides: of the window; one number for all axes or one for each, as are the dilations.
      padding: "SAME", "VALID", "CAUSAL" (one axis only), "CIRCULAR", "REFLECT", or zeros: a number, one for each axis,
        or (low, high) for each. All as in `flax.nnx.Conv`.
      input_dilation: put this minus one zeros between the entries of the input, padded in numbers or "VALID".
      kernel_dilation: leave out this minus one places between the entries of the kernel.
      feature_group_count: groups of outputs that see only their own share of the channels.
      **unit: see `Unit`.

    Returns:
      (b, places..., out). Gradients are those of the formula, with a zero derivative of the distance where it is
      clamped, and of the direction of a zero patch or kernel.

    Raises:
      ValueError: shapes, dtypes or a name do not fit.
    """
    check_operands(x, w, feature_group_count)
    x, window = conv_window(
        x,
        w.shape[:-2],
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        groups=feature_group_count,
    )
    return yat_windows(x, w, window, **unit)


def yat_conv_transpose(
    x: Array,
    w: Array,
    *,
    strides: Sizes | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: Sizes | None = 1,
    transpose_kernel: bool = False,
    **unit: Unpack[Unit],
) -> Array:
    """Return the ⵟ-product of every patch of `x`, strides − 1 zeros put between its entries, with every kernel.

    Args:
      x: (b, spatial..., in).
      w: (k..., in, out), or (k..., out, in) if `transpose_kernel`, of x's dtype.
      strides: how many places an entry of the input stands for.
      padding: "SAME" (strides · size places), "VALID", "CIRCULAR" (those of the periodic input), or as many zeros as
        given around the dilated input. All as in `flax.nnx.ConvTranspose`.
      kernel_dilation: leave out this minus one places between the entries of the kernel.
      transpose_kernel: w is the kernel of the convolution whose derivative by its input has p·w as its transpose.
      **unit: see `Unit`.

    Returns:
      (b, places..., out), with the gradients of `yat_conv`.

    Raises:
      ValueError: shapes, dtypes or a name do not fit.
    """
    w = turned(w) if transpose_kernel else w
    check_operands(x, w, 1)
    x, window = transposed_window(
        x, w.shape[:-2], strides=strides, padding=padding, kernel_dilation=kernel_dilation, mirrored=transpose_kernel
    )
    return yat_windows(x, w, window, **unit)


def turned(w: Array) -> Array:
    """Return the kernel flipped along each spatial axis, with its last two axes exchanged."""
    return jnp.flip(w, tuple(range(w.ndim - 2))).swapaxes(-1, -2)


def check_operands(x: Array, w: Array, groups: int) -> None:
    """Raise a ValueError if x (b, spatial..., in) and w (k..., in / groups, out) do not fit each other."""
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w {w.dtype}; cast both to the compute dtype.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x and w are {x.dtype}; they must be of a floating dtype.")
    if w.ndim < 3 or x.ndim != w.ndim:
        raise ValueError(
            f"x is {x.shape} and w {w.shape}; they must be (b, spatial..., in) and (k..., in/groups, out)."
        )
    if groups < 1 or x.shape[-1] != groups * w.shape[-2] or w.shape[-1] % groups:
        raise ValueError(
            f"x has {x.shape[-1]} features, w is (..., {w.shape[-2]}, {w.shape[-1]}) and feature_group_count {groups}; "
            "w must have 1/groups of the features, and a multiple of groups outputs."
        )


def yat_windows(
    x: Array,
    w: Array,
    window: Window,
    *,
    bias: Array | float = 0.0,
    alpha: Array | float = 1.0,
    epsilon: Array | float = 1e-5,
    spherical: bool = False,
    nonnegative_bias: bool = True,
    distance: str = "expanded",
    dtype: jnp.dtype | None = None,
) -> Array:
    """Return the ⵟ-product of w (k..., in / groups, out) with what `window` shows of x (b, spatial..., in).

    The arguments are those of `Unit`; `yat_conv` and `yat_conv_transpose` make the window.
    """
    check_distance(distance)
    check_epsilon(epsilon)
    dtype = jnp.dtype(dtype or x.dtype)
    parts = tuple(_part(p, w.shape[-1]) for p in (bias, alpha, epsilon))
    if distance == "expanded":
        return _expanded(Form(window, spherical, nonnegative_bias, dtype), x, w, *parts)
    dot = convolve(window, x, w)
    if spherical:
        patch, kernel = _squares(window, x, w)
        dot = dot * _inverse_norm(patch) * _inverse_norm(kernel)
    return ratio_of(dot, _distances(x, w, window, spherical), *parts).astype(dtype)


def _part(part: Array | float, outputs: int) -> Array:
    """Return b, α or ε as it broadcasts to the outputs."""
    part = jnp.asarray(part, jnp.float32)
    if part.shape not in ((), (1,), (outputs,)):
        raise ValueError(f"bias, alpha or epsilon is {part.shape}; it must be a number, (1,) or ({outputs},).")
    return part


class Form(NamedTuple):
    """What is known of a ⵟ convolution by the expanded distance when it is traced.

    Attributes:
      window: over x.
      spherical: compare directions.
      nonnegative_bias: see `Tail`.
      dtype: of the result.
    """

    window: Window
    spherical: bool
    nonnegative_bias: bool
    dtype: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expanded(form: Form, x: Array, w: Array, bias: Array, alpha: Array, epsilon: Array) -> Array:
    return _forward(form, x, w, bias, alpha, epsilon)[0]


def _forward(form, x, w, bias, alpha, epsilon):
    patch, kernel = _squares(form.window, x, w)
    dot = convolve(form.window, x, w)
    if form.spherical:
        dot = dot * (_inverse_norm(patch) * _inverse_norm(kernel))
    s = 2.0 if form.spherical else patch + kernel
    u, kept = Tail(form.nonnegative_bias, x.dtype).respond(dot, s, bias, epsilon)
    return (alpha * u).astype(form.dtype), (x, w, bias, alpha, epsilon, kept)


def _backward(form, residuals, g):
    """The squares go first, and their sums before the convolutions: XLA:CPU then needs least memory, hence time."""
    x, w, bias, alpha, epsilon, kept = residuals
    (patch, kernel), of_squares = jax.vjp(partial(_squares, form.window), x, w)
    g = g.astype(jnp.float32)
    s = 2.0 if form.spherical else patch + kernel
    u, t, free = Tail(form.nonnegative_bias, x.dtype).recover(kept, s, bias, epsilon)
    ga, spread = g * alpha, 1.0 + free
    of_dot = 2.0 * ga * t * spread
    if form.spherical:  # the lengths take what points along the patch and the kernel: cos · t = u − bt
        along = ga * spread * (bias * t - u)
        of_square = [jnp.where(s > TINY, sum_to(along, s.shape) / jnp.maximum(s, TINY), 0.0) for s in (patch, kernel)]
        of_dot = of_dot * (_inverse_norm(patch) * _inverse_norm(kernel))
    else:
        along = -ga * t * free
        of_square = [sum_to(along, s.shape) for s in (patch, kernel)]
    more_x, more_w = of_squares(tuple(of_square))
    of_x, of_w = _convolve_backward(form.window, (x, w), of_dot)
    of_bias, of_alpha, of_epsilon = (jnp.sum(a, tuple(range(g.ndim - 1))) for a in (g * t, g * u, ga * t * t))
    of_unit = (2.0 * alpha * of_bias, bias), (of_alpha, alpha), (-of_epsilon, epsilon)
    return more_x + of_x, more_w + of_w, *(sum_to(a, part.shape) for a, part in of_unit)


_expanded.defvjp(_forward, _backward)


def _squares(window: Window, x: Array, w: Array) -> tuple[Array, Array]:
    """Return ‖p‖² and ‖w‖² as they broadcast to the outputs: (b, places..., 1 or out) and (out,), float32."""
    patch, outputs = patch_squares(x, window), w.shape[-1]
    if window.groups > 1:
        shares = (*patch.shape, outputs // window.groups)
        patch = jnp.broadcast_to(patch[..., None], shares).reshape(*patch.shape[:-1], outputs)
    return patch, jnp.abs(squares(w, tuple(range(w.ndim - 1))))  # abs: else XLA:CPU writes ‖p‖² + ‖w‖² out


def patch_squares(x: Array, window: Window) -> Array:
    """Return ‖p‖² of the channels of each group, (b, places..., groups), float32."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], window.groups, x.shape[-1] // window.groups)
    return window.sums(jnp.sum(x * x, -1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(window: Window, x: Array, w: Array) -> Array:
    """Return p·w in float32; its cotangent is rounded to the operands' dtype, then convolved."""
    return _convolve(window, x, w, jnp.float32)


def channels_last(axes: int) -> lax.ConvDimensionNumbers:
    """Return the layout of arrays (b, spatial..., c) of as many axes, and of kernels (k..., in, out)."""
    image = (0, axes - 1, *range(1, axes - 1))
    return lax.ConvDimensionNumbers(image, (axes - 1, axes - 2, *range(axes - 2)), image)


def _convolve(window: Window, x: Array, w: Array, dtype: jnp.dtype) -> Array:
    return lax.conv_general_dilated(
        x,
        w,
        window.strides,
        window.pads,
        window.input_dilation,
        window.kernel_dilation,
        channels_last(x.ndim),
        feature_group_count=window.groups,
        precision="highest",  # as in `aether.kernels.yat.product`
        preferred_element_type=dtype,
    )


def _convolve_forward(window, x, w):
    return convolve(window, x, w), (x, w)


def _convolve_backward(window, operands, g):
    x, w = operands
    of_x = jax.linear_transpose(lambda x: _convolve(window, x, w, x.dtype), x)
    of_w = jax.linear_transpose(lambda w: _convolve(window, x, w, x.dtype), w)
    g = g.astype(x.dtype)
    return *of_x(g), *of_w(g)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _inverse_norm(square: Array) -> Array:
    return jnp.where(square > 0, lax.rsqrt(jnp.maximum(square, TINY)), 0.0)


def _distances(x: Array, w: Array, window: Window, spherical: bool) -> Array:
    """Return Σ(p − w)² by differences, (b, places..., out), one entry of the window after the other.

    A zero patch or kernel in the place of a unit vector counts 1 more, so that D = 2 − 2 cos there too.
    """
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    places, groups = window.places(x.shape[1:-1]), window.groups
    scale, extra = jnp.ones(()), jnp.zeros(())
    if spherical:
        patch, kernel = _squares(window, x, w)
        scale = _inverse_norm(patch_squares(x, window))[..., None]
        w = w * _inverse_norm(kernel)
        extra = (patch == 0).astype(jnp.float32) + (kernel == 0)
    spread = window.spread(x)
    kernels = jnp.moveaxis(w.reshape(-1, w.shape[-2], groups, w.shape[-1] // groups), 1, -1)  # (k, groups, out, in)

    @jax.checkpoint
    def add(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        tap, kernel = entry
        rows = window.seen(spread, tap, places).reshape(x.shape[0], *places, groups, -1) * scale
        rows = jnp.moveaxis(rows.reshape(-1, groups, rows.shape[-1]), 0, 1)
        return total + squared_distances(rows, kernel), None

    zeros = jnp.zeros((groups, x.shape[0] * math.prod(places), w.shape[-1] // groups), jnp.float32)
    total = lax.scan(add, zeros, (window.taps(), kernels))[0]
    return jnp.moveaxis(total, 0, 1).reshape(x.shape[0], *places, -1) + extra
