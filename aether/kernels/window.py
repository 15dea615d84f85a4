"""The geometry of convolutions: where a window stands over an input, and what it sees there."""

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

CONV_PADDINGS = ("SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT")
TRANSPOSED_PADDINGS = ("SAME", "VALID", "CIRCULAR")

Pads = tuple[tuple[int, int], ...]
Padding = str | int | Sequence[int | Sequence[int]]
Sizes = int | Sequence[int]


class Window(NamedTuple):
    """A window on its way over an input: what `lax.conv_general_dilated` takes beside its operands."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: Pads
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1

    @property
    def extent(self) -> tuple[int, ...]:
        """How many places the dilated window spans along each axis."""
        return extents(self.shape, self.kernel_dilation)

    def spread(self, x: Array) -> Array:
        """Return x (b, spatial..., c) with the zeros of dilation and padding written out."""
        pads = [(low, high, rate - 1) for (low, high), rate in zip(self.pads, self.input_dilation, strict=True)]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

    def places(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return how many places the window takes along each axis of an input of these spatial sizes."""
        spans = [(n - 1) * r + 1 + sum(p) for n, r, p in zip(sizes, self.input_dilation, self.pads, strict=True)]
        return tuple(max((n - e) // s + 1, 0) for n, e, s in zip(spans, self.extent, self.strides, strict=True))

    def taps(self) -> Array:
        """Return the (prod(shape), axes) offsets of the window's entries from its first, in the kernel's order."""
        offsets = list(itertools.product(*(range(k) for k in self.shape)))
        return jnp.asarray(np.array(offsets, np.int32) * np.array(self.kernel_dilation, np.int32))

    def seen(self, spread: Array, tap: Array, places: tuple[int, ...]) -> Array:
        """Return what the entry at offset `tap` sees of the spread input at every place, (b, places..., c)."""
        spans = [(n - 1) * s + 1 for n, s in zip(places, self.strides, strict=True)]
        starts = [jnp.zeros((), tap.dtype), *tap, jnp.zeros((), tap.dtype)]
        part = lax.dynamic_slice(spread, starts, (spread.shape[0], *spans, spread.shape[-1]))
        return part[(slice(None), *(slice(None, None, s) for s in self.strides))]

    def patches(self, x: Array) -> Array:
        """Return the patches of x (b, spatial..., c) as (b, places..., prod(shape), c), in the kernel's order."""
        spread, places = self.spread(x), self.places(x.shape[1:-1])
        return jax.vmap(lambda tap: self.seen(spread, tap, places), out_axes=-2)(self.taps())

    def sums(self, x: Array) -> Array:
        """Return the sums of x (b, spatial..., c) over the window at every place, (b, places..., c)."""
        return lax.reduce_window(
            x,
            np.zeros((), x.dtype),
            lax.add,
            (1, *self.shape, 1),
            (1, *self.strides, 1),
            ((0, 0), *self.pads, (0, 0)),
            (1, *self.input_dilation, 1),
            (1, *self.kernel_dilation, 1),
        )


def extents(shape: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Return how many places a dilated window spans along each axis."""
    return tuple((k - 1) * r + 1 for k, r in zip(shape, dilation, strict=True))


def per_axis(value: Sizes | None, axes: int, name: str) -> tuple[int, ...]:
    """Return `value` for each of the spatial axes: one number stands for all of them, None for 1.

    Raises:
      ValueError: there are not as many numbers as axes, or one is below 1.
    """
    value = 1 if value is None else value
    each = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(each) != axes or any(not isinstance(v, Integral) or v < 1 for v in each):
        raise ValueError(f"{name} is {value}; it must be an integer ≥ 1, or one for each of the {axes} spatial axes.")
    return tuple(int(v) for v in each)


def check_padding(padding: Padding, axes: int, names: Sequence[str], *, dilated: bool = False) -> str | Pads:
    """Return `padding` as one of `names`, or as (low, high) for each of the spatial axes.

    Raises:
      ValueError: it is none of these; "CAUSAL" knows one axis only, and a dilated input no name but "VALID".
    """
    form = f"one of {', '.join(names)}, a number, or a number or (low, high) for each of the {axes} spatial axes"
    if isinstance(padding, str):
        if padding not in names:
            raise ValueError(f"padding is {padding!r}; it must be {form}.")
        if padding == "CAUSAL" and axes != 1:
            raise ValueError(f"padding is 'CAUSAL' with {axes} spatial axes; it is known for one axis only.")
        if dilated and padding != "VALID":
            raise ValueError(f"padding is {padding!r} with an input_dilation; give it in numbers, or as 'VALID'.")
        return padding
    each = (padding,) * axes if isinstance(padding, int) else tuple(padding)
    pads = tuple((p, p) if isinstance(p, int) else tuple(p) for p in each)
    if len(pads) != axes or any(len(p) != 2 for p in pads):
        raise ValueError(f"padding is {padding}; it must be {form}.")
    return pads  # type: ignore[return-value]


def conv_window(
    x: Array,
    shape: tuple[int, ...],
    *,
    strides: Sizes | None = 1,
    padding: Padding = "SAME",
    input_dilation: Sizes | None = 1,
    kernel_dilation: Sizes | None = 1,
    groups: int = 1,
) -> tuple[Array, Window]:
    """Return the window of a convolution over x (b, spatial..., c), and x wrapped or reflected if `padding` says so.

    As in `flax.nnx.Conv`; an input that is dilated takes its padding in numbers, or "VALID".
    """
    axes = len(shape)
    strides, rate = per_axis(strides, axes, "strides"), per_axis(kernel_dilation, axes, "kernel_dilation")
    input_rate = per_axis(input_dilation, axes, "input_dilation")
    extent = extents(shape, rate)
    pads = check_padding(padding, axes, CONV_PADDINGS, dilated=max(input_rate) > 1)
    if pads == "CIRCULAR" or pads == "REFLECT":
        x = _around(x, extent, pads)
    if pads == "CAUSAL":
        pads = ((extent[0] - 1, 0),)
    if isinstance(pads, str):
        pads = tuple(lax.padtype_to_pads(x.shape[1:-1], extent, strides, "SAME" if pads == "SAME" else "VALID"))
    return _settled(x, Window(shape, strides, pads, input_rate, rate, groups))


def transposed_window(
    x: Array,
    shape: tuple[int, ...],
    *,
    strides: Sizes | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: Sizes | None = 1,
    mirrored: bool = False,
) -> tuple[Array, Window]:
    """Return the window of a transposed convolution over x (b, spatial..., c), and x wrapped if CIRCULAR.

    As in `flax.nnx.ConvTranspose`; `mirrored` is its `transpose_kernel`, on which depends where CIRCULAR puts the
    place that is left over.
    """
    axes = len(shape)
    strides, rate = per_axis(strides, axes, "strides"), per_axis(kernel_dilation, axes, "kernel_dilation")
    extent, pads = extents(shape, rate), check_padding(padding, axes, TRANSPOSED_PADDINGS)
    if pads == "CIRCULAR":
        x, pads = _periodic(x, extent, strides, mirrored)
    elif isinstance(pads, str):
        pads = tuple(_transposed_pads(e, s, pads == "SAME") for e, s in zip(extent, strides, strict=True))
    return _settled(x, Window(shape, (1,) * axes, pads, strides, rate))


def _settled(x: Array, window: Window) -> tuple[Array, Window]:
    """Check that the window fits, and take negative padding off x: XLA misreads it on the CPU."""
    if min(window.places(x.shape[1:-1])) < 1:
        raise ValueError(
            f"x has spatial axes {x.shape[1:-1]} and padding {window.pads}, the dilated kernel has {window.extent}; "
            "the padded input must be at least as large as the kernel."
        )
    if all(p >= 0 for pair in window.pads for p in pair):
        return x, window
    cuts, pads = [(0, 0, 0)], []
    for (low, high), rate in zip(window.pads, window.input_dilation, strict=True):
        first, last = max(-(low // rate), 0), max(-(high // rate), 0)
        cuts.append((-first, -last, 0))
        pads.append((low + first * rate, high + last * rate))
    return lax.pad(x, jnp.zeros((), x.dtype), [*cuts, (0, 0, 0)]), window._replace(pads=tuple(pads))


def _around(x: Array, extent: tuple[int, ...], padding: str) -> Array:
    """Wrap or reflect x by what makes a window of `extent` fit at every place."""
    pads = [(0, 0), *(((e - 1) // 2, e // 2) for e in extent), (0, 0)]
    if padding == "REFLECT" and any(high >= n for (_, high), n in zip(pads, x.shape, strict=True)):
        raise ValueError(
            f"padding is 'REFLECT' by up to {tuple(p[1] for p in pads[1:-1])} and x has spatial axes {x.shape[1:-1]}; "
            "each must be larger than its padding."
        )
    return jnp.pad(x, pads, "wrap" if padding == "CIRCULAR" else "reflect")


def _transposed_pads(extent: int, stride: int, same: bool) -> tuple[int, int]:
    """Return the zeros around a dilated input that make the places stride · size (SAME), or all that touch it."""
    if not same:
        return extent - 1, max(extent, stride) - 1
    low = extent - 1 if stride >= extent else (extent + stride - 1) // 2
    return low, extent + stride - 2 - low


def _periodic(x: Array, extent: tuple[int, ...], strides: tuple[int, ...], mirrored: bool) -> tuple[Array, Pads]:
    """Repeat x so that a window over the dilated input sees one period of the periodic one; return the pads left."""
    pads = []
    for axis, (e, s) in enumerate(zip(extent, strides, strict=True), 1):
        size = x.shape[axis]
        spare = -max(e - s, 0) % (2 * size * s)
        first = -((spare + (not mirrored)) // 2) - (
            e - 1
        )  # the place in the dilated input where the first window starts
        last = first + size * s + e - 2
        start, stop = -(-first // s), last // s
        x = jnp.take(x, np.arange(start, stop + 1) % size, axis)
        pads.append((start * s - first, last - stop * s))
    return x, tuple(pads)
