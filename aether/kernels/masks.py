"""Which keys a query sees, described by its causes, so that the booleans of one block can be made without the rest.

Axes: b batch, t query, s key, h = g r heads, g key/value heads.
"""

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["offset", "query_segments", "key_segments", "valid", "dense"],
    meta_fields=["causal", "window"],
)
@dataclass(frozen=True)
class Mask:
    """A query sees a key if all that is given here allows it; `Mask()` allows everything.

    Query i stands at position offset + i, key j at position j.
    """

    causal: bool = False
    """Query at p sees keys 0 … p."""
    window: int | None = None
    """Query at p sees keys p − window + 1 … p; implies `causal`."""
    offset: Array | int = 0
    """How many keys precede the first query, as they do in a cache."""
    query_segments: Array | None = None
    """(b, t) integers: sees keys of the same number in `key_segments`."""
    key_segments: Array | None = None
    """(b, s) integers."""
    valid: Array | None = None
    """(b, s) booleans: False for keys that are padding."""
    dense: Array | None = None
    """Booleans broadcastable to (b, h, t, s)."""

    def checked(self, b: int, g: int, r: int, t: int, s: int) -> Self:
        """Return the mask for scores (b, g, r, t, s), with h = g r, and `dense` with their five axes.

        Raises:
          ValueError: an array does not fit the shape, segments come alone, or the window is below 1.
        """
        check_window(self.window)
        if (self.query_segments is None) != (self.key_segments is None):
            raise ValueError("query_segments and key_segments go together; one of them is None.")
        for name, wanted in (("query_segments", (b, t)), ("key_segments", (b, s)), ("valid", (b, s))):
            array = getattr(self, name)
            if array is not None and array.shape != wanted:
                raise ValueError(f"{name} is {array.shape}; it must be {wanted}, one for each position.")
        for name in ("query_segments", "key_segments"):
            array = getattr(self, name)
            if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name} is {array.dtype}; it must be of integers.")
        for name in ("valid", "dense"):
            array = getattr(self, name)
            if array is not None and array.dtype != bool:
                raise ValueError(f"{name} is {array.dtype}; it must be bool, True where a query may look.")
        if self.dense is None:
            return self
        whole, shape = (b, g * r, t, s), (1,) * (4 - self.dense.ndim) + self.dense.shape
        if len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
            raise ValueError(f"mask is {self.dense.shape}; it must broadcast to (b, h, t, s) = {whole}.")
        heads = (1, 1) if shape[1] == 1 else (g, r)
        return replace(self, dense=self.dense.reshape(shape[0], *heads, *shape[2:]))

    def of_queries(self, start: Array | int, rows: int) -> Self:
        """Return the mask of the `rows` queries from `start` on."""

        def cut(array: Array | None, axis: int) -> Array | None:
            return None if array is None else _cut(array, axis, start, rows)

        segments, dense = cut(self.query_segments, 1), cut(self.dense, -2)
        return replace(self, offset=self.offset + start, query_segments=segments, dense=dense)

    def padded(self, t: int, s: int) -> Self:
        """Append `t` queries and `s` keys of any kind; whoever calls this hides them."""

        def pad(array: Array | None, *counts: int) -> Array | None:
            if array is None:
                return None
            sizes = array.shape[-len(counts) :]
            after = [(0, n if size > 1 else 0) for n, size in zip(counts, sizes, strict=True)]
            return jnp.pad(array, [(0, 0)] * (array.ndim - len(counts)) + after)

        return replace(
            self,
            query_segments=pad(self.query_segments, t),
            key_segments=pad(self.key_segments, s),
            valid=pad(self.valid, s),
            dense=pad(self.dense, t, s),
        )

    def block(self, row: Array | int, rows: int, column: Array | int, columns: int) -> Array | None:
        """Return what queries row … row + rows − 1 see of as many keys, or None if that is everything.

        Returns:
          Booleans (b, g, r, rows, columns), axes of 1 where they are all alike.
        """
        parts = []
        if self.causal or self.window is not None:
            ahead = (column + jnp.arange(columns)) - (row + self.offset + jnp.arange(rows))[:, None]
            seen = ahead <= 0
            parts.append((seen if self.window is None else seen & (ahead > -self.window))[None, None, None])
        if self.query_segments is not None and self.key_segments is not None:
            q, k = _cut(self.query_segments, 1, row, rows), _cut(self.key_segments, 1, column, columns)
            parts.append((q[:, :, None] == k[:, None, :])[:, None, None])
        if self.valid is not None:
            parts.append(_cut(self.valid, 1, column, columns)[:, None, None, None])
        if self.dense is not None:
            parts.append(_cut(_cut(self.dense, -2, row, rows), -1, column, columns))
        return reduce(jnp.logical_and, parts) if parts else None

    def span(self, row: Array | int, rows: int, columns: int, blocks: int) -> tuple[Array | int, Array | int]:
        """Return [first, last) of the `blocks` key blocks of `columns` that causality leaves to these queries."""
        if not self.causal and self.window is None:
            return 0, blocks
        last = jnp.clip((row + self.offset + rows - 1) // columns + 1, 0, blocks)
        if self.window is None:
            return 0, last
        return jnp.clip((row + self.offset - self.window + 1) // columns, 0, blocks), last


def check_window(window: int | None) -> None:
    """Raise a `ValueError` unless `window` is None or a whole number of positions."""
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window is {window}; it must be an integer of at least 1, or None for no window.")


def _cut(array: Array, axis: int, start: Array | int, size: int) -> Array:
    """Slice an axis that may also be 1 or wanted whole."""
    if array.shape[axis] in (1, size):
        return array
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
