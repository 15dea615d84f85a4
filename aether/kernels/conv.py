"""Convolutions of ⵟ units: the ⵟ-product of every patch with every kernel.

`y = α (p·w + b)² / (max(‖p‖² + ‖w‖² − 2 p·w, 0) + ε)` for each patch p; the zeros of padding and of dilation are
entries of the patch, and the kernel counts whole. p·w is one convolution; ‖p‖² is the channel sum of x², summed over
the window, so no second convolution is needed. The backward pass keeps one number an output, as in
`aether.kernels.yat`; if `spherical`, it is the cosine in float32.
"""

import math
from functools import partial
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array, lax

from aether.kernels.window import Padding, Sizes, Window, conv_window, transposed_window
from aether.kernels.yat import check_distance, check_epsilon, ratio, ratio_of, squared_distances

_TINY = 1e-12  # squared norms below this are not stretched to a unit vector


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
    groups, outputs = window.groups, w.shape[-1]
    dtype = jnp.dtype(dtype or x.dtype)
    parts = tuple(_grouped(p, groups, w.shape[-1]) for p in (bias, alpha, epsilon))
    patch_square, kernel_square = patch_squares(x, window)[..., None], _kernel_squares(w, groups)
    dot = convolve(window, x, w)
    dot = dot.reshape(*dot.shape[:-1], groups, outputs // groups)
    if spherical:
        dot = cosine(x.dtype, dot, patch_square, kernel_square)
    if distance == "exact":
        y = ratio_of(dot, _distances(x, w, window, spherical), *parts).astype(dtype)
    else:
        squares = (2.0, 0.0) if spherical else (patch_square, kernel_square)
        keep_sign = nonnegative_bias and not spherical  # the cosine is kept in any case
        y = ratio(dot, *squares, *parts, nonnegative_bias=keep_sign, kept=x.dtype, dtype=dtype)
    return y.reshape(*y.shape[:-2], outputs)


def _grouped(part: Array | float, groups: int, outputs: int) -> Array:
    """Return b, α or ε as it goes with outputs (..., groups, out / groups)."""
    part = jnp.asarray(part, jnp.float32)
    if part.shape not in ((), (1,), (outputs,)):
        raise ValueError(f"bias, alpha or epsilon is {part.shape}; it must be a number, (1,) or ({outputs},).")
    return part.reshape(groups, -1) if part.size > 1 else part


def patch_squares(x: Array, window: Window) -> Array:
    """Return ‖p‖² of the channels of each group, (b, places..., groups), float32."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], window.groups, x.shape[-1] // window.groups)
    return window.sums(jnp.sum(x * x, -1))


def _kernel_squares(w: Array, groups: int) -> Array:
    w = w.astype(jnp.float32)
    return jnp.sum(w * w, tuple(range(w.ndim - 1))).reshape(groups, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(window: Window, x: Array, w: Array) -> Array:
    """Return p·w in float32; its cotangent is rounded to the operands' dtype, then convolved."""
    return _convolve(window, x, w, jnp.float32)


def _convolve(window: Window, x: Array, w: Array, dtype: jnp.dtype) -> Array:
    n = x.ndim
    channels_last = lax.ConvDimensionNumbers(
        (0, n - 1, *range(1, n - 1)), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *range(1, n - 1))
    )
    return lax.conv_general_dilated(
        x,
        w,
        window.strides,
        window.pads,
        window.input_dilation,
        window.kernel_dilation,
        channels_last,
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def cosine(dtype: jnp.dtype, dot: Array, x_square: Array, w_square: Array) -> Array:
    """Return x·w / (‖x‖ ‖w‖), which is all that its backward pass keeps an output; 0, as its gradient, if either is 0.

    x_square and w_square broadcast to `dot`: (..., 1) and (..., out). `dtype` is what the cotangent of `dot` will be
    rounded to: the gradients along x and w cancel only if those of the lengths are of the same rounded numbers.
    """
    return dot * _inverse_norm(x_square) * _inverse_norm(w_square)


def _inverse_norm(square: Array) -> Array:
    return jnp.where(square > 0, lax.rsqrt(jnp.maximum(square, _TINY)), 0.0)


def _cosine_forward(dtype, dot, x_square, w_square):
    cos = cosine(dtype, dot, x_square, w_square)
    return cos, (cos, x_square, w_square)


def _cosine_backward(dtype, residuals, g):
    cos, x_square, w_square = residuals
    g_dot = (g * _inverse_norm(x_square) * _inverse_norm(w_square)).astype(dtype).astype(jnp.float32)
    lengths = jnp.sqrt(jnp.maximum(x_square, _TINY)) * jnp.sqrt(jnp.maximum(w_square, _TINY))
    slope = -0.5 * g_dot * (cos * lengths)

    def of_square(square, axes):
        return jnp.where(square > _TINY, jnp.sum(slope, axes).reshape(square.shape) / jnp.maximum(square, _TINY), 0.0)

    return g_dot, of_square(x_square, -1), of_square(w_square, tuple(range(cos.ndim - w_square.ndim)))


cosine.defvjp(_cosine_forward, _cosine_backward)


def _distances(x: Array, w: Array, window: Window, spherical: bool) -> Array:
    """Return Σ(p − w)² by differences, (b, places..., groups, out / groups), one entry of the window after the other.

    A zero patch or kernel in the place of a unit vector counts 1 more, so that D = 2 − 2 cos there too.
    """
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    places, groups = window.places(x.shape[1:-1]), window.groups
    scale, extra = jnp.ones(()), jnp.zeros(())
    if spherical:
        patch, kernel = patch_squares(x, window), _kernel_squares(w, groups)
        scale = _inverse_norm(patch)[..., None]
        w = w * _inverse_norm(kernel).reshape(-1)
        extra = (patch == 0)[..., None].astype(jnp.float32) + (kernel == 0)
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
    return jnp.moveaxis(total, 0, 1).reshape(x.shape[0], *places, groups, -1) + extra
