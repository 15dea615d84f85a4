"""Every ⵟ layer once more, from its formula alone: NumPy in float64, slow, independent of what it checks.

Distances are Σ(x − w)² and never an expansion, convolutions loop over their patches. All functions also take complex
arrays (no abs, maximum or comparison of data), so that `gradient` can differentiate them by complex steps, which
have no cancellation: Im f(x + ih) / h with h = 1e-30 is the derivative to the last digit.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

STEP = 1e-30

Array = np.ndarray[Any, Any]
Padding = str | int | Sequence[int | tuple[int, int]]


def _exact(x: Any) -> Array:
    x = np.asarray(x)
    return x if np.iscomplexobj(x) else x.astype(np.float64)


def unit(x: Any, axis: int | tuple[int, ...] = -1) -> Array:
    """x / ‖x‖ along `axis`; the zero vector stays zero, and its derivative is zero too."""
    x = _exact(x)
    zero = np.sum(x.real**2, axis, keepdims=True) == 0
    return np.where(zero, 0, x) / np.where(zero, 1, np.sqrt(np.sum(x * x, axis, keepdims=True)))


def _zero(x: Array) -> Array:
    return (np.sum(x.real**2, -1) == 0).astype(np.float64)


def _ratio(x: Array, w: Array, bias: Any, alpha: Any, epsilon: Any, unit_x: bool, unit_w: bool) -> Array:
    """α (x·w + b)² / (‖x − w‖² + ε) over the last axis, of vectors that broadcast against each other.

    Where a zero vector stands for a unit vector its ‖·‖² still counts as one: D = 2 − 2 x̂·ŵ = 2.
    """
    x, w = unit(x) if unit_x else x, unit(w) if unit_w else w
    distance = np.sum((x - w) ** 2, -1) + unit_x * _zero(x) + unit_w * _zero(w)
    return _exact(alpha) * (np.sum(x * w, -1) + _exact(bias)) ** 2 / (distance + _exact(epsilon))


def yat(
    x: Any,
    w: Any,
    *,
    bias: Any = 0.0,
    alpha: Any = 1.0,
    epsilon: Any = 1e-5,
    spherical: bool = False,
    weight_normalized: bool = False,
) -> Array:
    """y_j = α (x·w_j + b_j)² / (‖x − w_j‖² + ε): x (..., d), w (d, n) of columns w_j -> (..., n).

    `spherical` takes x and w_j as unit vectors, `weight_normalized` only w_j.
    """
    x, w = _exact(x), _exact(w)
    return _ratio(x[..., None, :], w.T, bias, alpha, epsilon, spherical, spherical or weight_normalized)


def condition(
    x: Any,
    w: Any,
    *,
    epsilon: Any = 1e-5,
    spherical: bool = False,
    weight_normalized: bool = False,
    bias: Any = 0.0,
    alpha: Any = 1.0,
) -> Array:
    """(‖x‖² + ‖w‖²) / (D + ε), how much the expansion of D loses; takes what `yat` takes, and is of its shape."""
    x, w = _exact(x)[..., None, :], _exact(w).T
    x, w = unit(x) if spherical else x, unit(w) if spherical or weight_normalized else w
    size = np.sum(x * x, -1) + np.sum(w * w, -1)
    return size / (np.sum((x - w) ** 2, -1) + epsilon)


def kappa(x: Any, w: Any, epsilon: Any = 1e-5, *, spherical: bool = False) -> float:
    """The condition number max(1, max over pairs (‖x‖² + ‖w‖²) / (D + ε)) of `yat(x, w)`."""
    return max(1.0, float(np.max(condition(x, w, epsilon=epsilon, spherical=spherical))))


# Convolutions


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _dilate(x: Array, rate: Sequence[int]) -> Array:
    """Put rate − 1 zeros between the entries of each spatial axis of x (b, spatial..., c)."""
    size = [(n - 1) * r + 1 for n, r in zip(x.shape[1:-1], rate, strict=True)]
    out = np.zeros((x.shape[0], *size, x.shape[-1]), x.dtype)
    every: tuple[Any, ...] = tuple(slice(None, None, r) for r in (1, *rate))
    out[every] = x
    return out


def _pairs(padding: Sequence[int | tuple[int, int]]) -> list[tuple[int, int]]:
    return [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding]


def _pad(x: Array, pairs: Sequence[tuple[int, int]], mode: str = "constant") -> Array:
    return np.pad(x, [(0, 0), *pairs, (0, 0)], mode=mode)  # type: ignore[call-overload]


def _patches(x: Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Array:
    """Gather every window of x (b, spatial..., c) -> (b, out..., prod(window), c), first window axis slowest."""
    extent = [(k - 1) * r + 1 for k, r in zip(window, dilation, strict=True)]
    size = [(n - e) // s + 1 for n, e, s in zip(x.shape[1:-1], extent, strides, strict=True)]
    out = np.zeros((x.shape[0], *size, math.prod(window), x.shape[-1]), x.dtype)
    place: Any
    for place in itertools.product(*map(range, size)):
        for t, tap in enumerate(itertools.product(*map(range, window))):
            at: Any = tuple(p * s + k * r for p, s, k, r in zip(place, strides, tap, dilation, strict=True))
            out[:, *place, t] = x[:, *at]
    return out


def _conv_pads(
    x: Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: Padding
) -> tuple[Array, list[tuple[int, int]]]:
    """Return x, wrapped or reflected if `padding` says so, and the zeros that it still needs on both sides."""
    extent = [(k - 1) * r + 1 for k, r in zip(window, dilation, strict=True)]
    if padding == "VALID":
        return x, [(0, 0)] * len(window)
    if padding == "SAME":
        total = [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(x.shape[1:-1], strides, extent, strict=True)]
        return x, [(t // 2, t - t // 2) for t in total]
    if padding in ("CIRCULAR", "REFLECT"):
        around = [((e - 1) // 2, e // 2) for e in extent]
        return _pad(x, around, "wrap" if padding == "CIRCULAR" else "reflect"), [(0, 0)] * len(window)
    if padding == "CAUSAL":
        return x, [(e - 1, 0) for e in extent]
    if isinstance(padding, str):
        raise ValueError(f"unknown padding {padding!r}")
    return x, _pairs(_each(padding, len(window)) if isinstance(padding, int) else padding)


def yat_conv(
    x: Any,
    w: Any,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    of: Callable[..., Array] = yat,
    **options: Any,
) -> Array:
    """`yat` of every patch: x (b, spatial..., in), w (k..., in / groups, out) -> (b, out spatial..., out).

    Padding as in flax.nnx.Conv; its zeros are entries of the patch. `options` are those of `yat`, with bias, α and ε of
    shape (out,) or one number; `of` may be another function of patches and kernel columns, such as `condition`.
    """
    x, w = _exact(x), _exact(w)
    window, n = w.shape[:-2], w.ndim - 2
    strides, dilation = _each(strides, n), _each(kernel_dilation, n)
    x, pads = _conv_pads(x, window, strides, dilation, padding)
    patches = _patches(_pad(_dilate(x, _each(input_dilation, n)), pads), window, strides, dilation)
    return _by_group(of, patches, w, feature_group_count, options)


def _by_group(of: Callable[..., Array], patches: Array, w: Array, groups: int, options: dict[str, Any]) -> Array:
    inputs, outputs = w.shape[-2], w.shape[-1] // groups
    w = w.reshape(-1, inputs, w.shape[-1])
    out = []
    for g in range(groups):
        mine = slice(g * outputs, (g + 1) * outputs)
        patch = patches[..., g * inputs : (g + 1) * inputs]
        flat = patch.reshape(*patch.shape[:-2], -1)
        local = {k: v[mine] if np.shape(v) == (w.shape[-1],) else v for k, v in options.items()}
        out.append(of(flat, w[..., mine].reshape(-1, outputs), **local))
    return np.concatenate(out, -1)


def yat_conv_transpose(
    x: Any,
    w: Any,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    transpose_kernel: bool = False,
    of: Callable[..., Array] = yat,
    **options: Any,
) -> Array:
    """`yat` of every patch of x with strides − 1 zeros put between its entries; the zeros are entries of the patch.

    x (b, spatial..., in), w (k..., in, out), or (k..., out, in) and flipped with `transpose_kernel`
    -> (b, out spatial..., out). Padding as in flax.nnx.ConvTranspose: SAME gives strides · size places, CIRCULAR those
    of the periodic input, explicit pairs pad the input with its zeros.
    """
    x, w = _exact(x), _exact(w)
    n = w.ndim - 2
    strides, dilation = _each(strides, n), _each(kernel_dilation, n)
    if transpose_kernel:
        w = np.swapaxes(np.flip(w, tuple(range(n))), -1, -2)
    size = [m * s for m, s in zip(x.shape[1:-1], strides, strict=True)]
    extent = [(k - 1) * r + 1 for k, r in zip(w.shape[:-2], dilation, strict=True)]
    x = _dilate(x, strides)
    if padding == "CIRCULAR":
        for axis, (m, s, e) in enumerate(zip(size, strides, extent, strict=True), 1):
            spare = -max(e - s, 0) % (2 * m)
            shift = (spare if transpose_kernel else spare + 1) // 2
            first = (-shift - (e - 1)) % m
            whole = np.concatenate([x, np.zeros_like(np.repeat(x.take([0], axis), s - 1, axis))], axis)
            x = whole.take(np.arange(first, first + m + e - 1) % m, axis)
        pads = [(0, 0)] * n
    elif padding in ("SAME", "VALID"):
        pads = [_transpose_pads(e, s, padding == "SAME") for e, s in zip(extent, strides, strict=True)]
    elif isinstance(padding, str):
        raise ValueError(f"unknown padding {padding!r}")
    else:
        pads = _pairs(_each(padding, n) if isinstance(padding, int) else padding)
    return _by_group(of, _patches(_pad(x, pads), w.shape[:-2], (1,) * n, dilation), w, 1, options)


def _transpose_pads(extent: int, stride: int, same: bool) -> tuple[int, int]:
    total = extent + stride - 2 + (0 if same else max(extent - stride, 0))
    low = min(extent - 1, -(-total // 2)) if same else extent - 1
    return low, total - low


# Attention and embedding


def rotate(x: Any, positions: Any, theta: float = 10000.0) -> Array:
    """Turn the pairs (x_2i, x_2i+1) of x (b, t, h, k) by positions · θ^(−2i/k); positions (t,) or (b, t)."""
    x = _exact(x)
    angle = np.asarray(positions, np.float64)[..., None, None] * theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angle), np.sin(angle)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def attention_scores(
    q: Any,
    k: Any,
    *,
    bias: Any = 0.0,
    alpha: Any = 1.0,
    epsilon: Any = 1e-5,
    spherical: bool = False,
) -> Array:
    """s = α (q·k + b)² / ((D + ε) √d): q (b, t, h, d), k (b, s, g, d), g | h -> (b, h, t, s).

    Query head i reads key head i // (h / g); bias, α and ε are numbers or one a head, (h,).
    """
    q, k = _exact(q), _exact(k)
    q, k = np.moveaxis(q, 2, 1), np.moveaxis(np.repeat(k, q.shape[2] // k.shape[2], 2), 2, 1)
    bias, alpha, epsilon = (_exact(v).reshape(-1, 1, 1) for v in (bias, alpha, epsilon))
    s = _ratio(q[..., :, None, :], k[..., None, :, :], bias, alpha, epsilon, spherical, spherical)
    return s / math.sqrt(q.shape[-1])


def attention_weights(
    s: Array, mask: Any | None = None, normalization: str = "softmax", power: float = 1.0, epsilon: float = 0.0
) -> Array:
    """Normalise scores (b, h, t, s) over s where `mask` allows; rows where it allows nothing are zero.

    softmax eˢ/Σeˢ, l1 s/(Σs + ε), softermax sⁿ/(Σsⁿ + ε) with n = `power`.
    """
    keep = np.broadcast_to(True if mask is None else np.asarray(mask, bool), s.shape)
    if normalization == "softmax":
        shift = np.max(np.where(keep, s.real, -np.inf), -1, keepdims=True)
        weights = np.where(keep, np.exp(np.where(keep, s - np.where(np.isfinite(shift), shift, 0), 0)), 0)
        epsilon = 0.0
    elif normalization in ("l1", "softermax"):
        weights = np.where(keep, s ** (power if normalization == "softermax" else 1), 0)
    else:
        raise ValueError(f"unknown normalization {normalization!r}")
    total = np.sum(weights, -1, keepdims=True) + epsilon
    return np.divide(weights, total, out=np.zeros_like(weights), where=np.any(keep, -1, keepdims=True) & (total != 0))


def yat_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any | None = None,
    normalization: str = "softmax",
    power: float = 1.0,
    l1_epsilon: float = 1e-12,
    **scores: Any,
) -> Array:
    """o = Σ_s weight_s v_s: q (b, t, h, d), k and v (b, s, g, d), mask that broadcasts to (b, h, t, s) -> (b, t, h, d).

    `l1_epsilon` is the ε of L1 and of softermax; `scores` are the options of `attention_scores`.
    """
    v = _exact(v)
    weights = attention_weights(attention_scores(q, k, **scores), mask, normalization, power, l1_epsilon)
    return np.einsum("bhts,bshd->bthd", weights, np.repeat(v, weights.shape[1] // v.shape[2], 2))


def attend(q: Any, table: Any, **options: Any) -> Array:
    """α (q·e)² / (‖q − e‖² + ε) of q (..., d) with every row e of the table (v, d) -> (..., v), as `yat`."""
    return yat(q, _exact(table).T, **options)


# Squashers and recurrent cells


def softermax(x: Any, power: float = 1.0, epsilon: float = 1e-12, axis: int | None = -1) -> Array:
    """xⁿ / (ε + Σxⁿ) for x ≥ 0."""
    y = _exact(x) ** power
    return y / (epsilon + np.sum(y, axis, keepdims=True))


def softer_sigmoid(x: Any, power: float = 1.0) -> Array:
    """xⁿ / (1 + xⁿ) for x ≥ 0: from 0 to 1."""
    y = _exact(x) ** power
    return y / (1 + y)


def soft_tanh(x: Any, power: float = 1.0) -> Array:
    """(xⁿ − 1) / (xⁿ + 1) for x ≥ 0: from −1 to 1."""
    y = _exact(x) ** power
    return (y - 1) / (y + 1)


def softsign(x: Any) -> Array:
    """x / (1 + |x|): odd, from −1 to 1; for cell states, which may be negative, where soft tanh has its pole."""
    x = _exact(x)
    return x / (1 + np.sqrt(x * x))


Map = Callable[[Array], Array]


def simple_cell(h: Array, x: Array, of_x: Map, of_h: Map) -> Array:
    """h' = soft tanh(ⵟ(x) + ⵟ(h)); `of_x` and `of_h` are the two ⵟ maps."""
    return soft_tanh(of_x(x) + of_h(h))


def gru_cell(h: Array, x: Array, of_x: Map, of_h: Map) -> Array:
    """h' = (1 − z) n + z h, with r, z = softer sigmoid(ⵟ(x) + ⵟ(h)) and n = soft tanh(ⵟ(x) + r ⵟ(h)).

    The maps give r, z and n one after the other.
    """
    (xr, xz, xn), (hr, hz, hn) = np.split(of_x(x), 3, -1), np.split(of_h(h), 3, -1)
    r, z = softer_sigmoid(xr + hr), softer_sigmoid(xz + hz)
    return (1 - z) * soft_tanh(xn + r * hn) + z * h


def lstm_cell(
    c: Array, h: Array, x: Array, of_x: Map, of_h: Map, *, output: Callable[[Array], Array] = softsign
) -> tuple[Array, Array]:
    """c' = f c + i g, h' = o · output(c'); i, f, o by softer sigmoid and g by soft tanh of ⵟ(x) + ⵟ(h) -> (c', h').

    The maps give i, f, g and o one after the other.
    """
    i, f, g, o = np.split(of_x(x) + of_h(h), 4, -1)
    c = softer_sigmoid(f) * c + softer_sigmoid(i) * soft_tanh(g)
    return c, softer_sigmoid(o) * output(c)


# Transformers


def encoder(p: dict[str, Array], x: Any, heads: int, *, mask: Any | None = None, positions: Any | None = None) -> Array:
    """Add the branches of bidirectional blocks to x (b, t, d), then normalise; of what kind they are says `p`.

    `p` maps paths to arrays, those of `blocks` with a leading layers axis. Where it has norms they come before each
    branch, by mean and variance. Attention is spherical ⵟ where it has an α, and a dot product where not; a hidden unit
    likewise, or tanh GELU. `mask` (b, t, t) is True where a query may look; `positions` (b, t) rotate queries and keys.
    """
    x = _exact(x)
    b, t, d = x.shape
    for i in range(len(p["blocks/attention/query/kernel"])):
        layer = {k.removeprefix("blocks/"): v[i] for k, v in p.items() if k.startswith("blocks/")}
        y = _normed(x, layer, "norm1")
        q, k, v = (_linear(y, layer, f"attention/{n}").reshape(b, t, heads, -1) for n in ("query", "key", "value"))
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        if "attention/alpha" in layer:
            s = attention_scores(q, k, spherical=True, **_unit_of(layer, "attention"))
        else:
            s = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(d / heads)
        weights = attention_weights(s, None if mask is None else np.asarray(mask)[:, None])
        x = x + _linear(np.einsum("bhts,bshk->bthk", weights, v).reshape(b, t, d), layer, "attention/out")
        y = _normed(x, layer, "norm2")
        if "mlp/hidden/alpha" in layer:
            h = yat(y, layer["mlp/hidden/kernel"], spherical=True, **_unit_of(layer, "mlp/hidden"))
        else:
            h = _linear(y, layer, "mlp/hidden")
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + _linear(h, layer, "mlp/out")
    return _normed(x, p, "norm")


def _linear(x: Array, p: dict[str, Array], name: str) -> Array:
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)


def _normed(x: Array, p: dict[str, Array], name: str) -> Array:
    if f"{name}/scale" not in p:
        return x
    centred = x - np.mean(x, -1, keepdims=True)
    y = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-5) * p[f"{name}/scale"]
    return y + p.get(f"{name}/bias", 0.0)


def _unit_of(p: dict[str, Array], name: str) -> dict[str, Array]:
    """Return b, α and ε of a unit that stores b and ε by their inverse softplus."""
    bias, epsilon = (np.logaddexp(0, p[f"{name}/{n}"]) for n in ("bias", "epsilon_param"))
    return dict(bias=bias, alpha=p[f"{name}/alpha"], epsilon=epsilon)


# Derivatives


def gradient(f: Callable[..., Array], args: Sequence[Any], cotangent: Any) -> list[tuple[Array, Array]]:
    """Differentiate Σ cotangent · f(*args) by complex steps: for each argument (gradient, Σ |its terms|).

    The terms of an entry are its contributions through each single output; their absolute sum is what the error of a
    gradient that cancels is measured by. One evaluation of f for each entry of each argument.
    """
    values = [_exact(a) for a in args]
    results = []
    for n, value in enumerate(values):
        grad, size = np.zeros(value.shape), np.zeros(value.shape)
        for at in np.ndindex(value.shape):
            moved = value.astype(np.complex128)
            moved[at] += 1j * STEP
            terms = np.asarray(cotangent) * (f(*values[:n], moved, *values[n + 1 :]).imag / STEP)
            grad[at], size[at] = np.sum(terms), np.sum(np.abs(terms))
        results.append((grad, size))
    return results
