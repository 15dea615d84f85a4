"""What flash attention has to do, by a model: products, exponentials and bytes of HBM, forward and backward.

A compiler counts a kernel as nothing, so the kernels state this. Tiles that causality or the window excludes count as
nothing, those that it cuts count whole. Vectors narrower than 128 occupy 128 lanes of HBM, as they do in TPU memory.
"""

import math
from typing import Any, NamedTuple

import numpy as np

LANES = 128


class Work(NamedTuple):
    """Of one call: FLOPs of the matrix products (two a multiplication), exponentials, and bytes to and from HBM."""

    flops: int
    exponentials: int
    hbm_bytes: int


def work(
    b: int,
    h: int,
    g: int,
    t: int,
    s: int,
    width: int,
    value_width: int,
    dtype: Any,
    *,
    causal: bool = False,
    window: int | None = None,
    offset: int = 0,
    blocks: tuple[int, int] = (512, 512),
) -> tuple[Work, Work]:
    """Return the work of the forward and of the backward pass.

    Args:
      b: rows of the batch.
      h: query heads.
      g: key/value heads.
      t: queries.
      s: keys.
      width: of queries and keys.
      value_width: of values.
      dtype: of the operands.
      causal: as in `Mask`, as are `window` and `offset`.
      window: see there.
      offset: see there.
      blocks: queries and keys of a tile.
    """
    rows, columns = blocks
    tiles = _tiles(t, s, rows, columns, causal or window is not None, window, offset)
    pairs = b * h * tiles * rows * columns
    size = np.dtype(dtype).itemsize
    both = sum(math.ceil(n / LANES) * LANES for n in (width, value_width))
    queries, keys = b * h * t, b * g * s
    fetched = b * h * tiles * columns * both * size  # keys and values, once a tile
    forward = Work(2 * pairs * (width + value_width), pairs, fetched + queries * (both * size + 4))
    of_queries = queries * (both * size + 4 * (width + 4 + 2))  # q and dL/dy; the gradient of q, sums, statistics
    backward = Work(2 * pairs * (3 * width + 2 * value_width), pairs, fetched + of_queries + 4 * keys * both)
    return forward, backward


def _tiles(t: int, s: int, rows: int, columns: int, causal: bool, window: int | None, offset: int) -> int:
    """Return how many tiles one head visits."""
    count, most = 0, math.ceil(s / columns)
    for row in range(offset, offset + t, rows):
        last = min((row + rows - 1) // columns + 1, most) if causal else most
        first = max(row - window + 1, 0) // columns if window is not None else 0
        count += max(last - first, 0)
    return count
