"""Attention: scores, their normalisation over the keys that a mask admits, and the weighted mean of values.

Axes: b batch, t query, s key, h heads, g key/value heads, r = h/g query heads a key/value head, k head width. Within
this module queries are (b, g, r, t, k), so that the r heads which share keys meet them in one product, uncopied.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.blockwise import blockwise
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.yat import product, yat

IMPLS = ("plain", "blockwise")
BLOCK = 256  # about the fastest on CPU at lengths 1024 to 4096, with one head or many


class Score(Protocol):
    """What compares prepared queries and keys; a pytree.

    (b, h, t, k) and (b, h, s, k) -> (b, h, t, s), or (b, g, r, t, k) and (b, g, 1, s, k) -> (b, g, r, t, s), float32.
    """

    def __call__(self, q: Array, k: Array) -> Array:
        """Return the scores."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DotScore:
    """q·k / √d."""

    def __call__(self, q: Array, k: Array) -> Array:
        """Return the scores."""
        return product("...md,...nd->...mn", q, k) / math.sqrt(q.shape[-1])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias", "alpha", "epsilon"],
    meta_fields=["spherical", "distance", "nonnegative_bias"],
)
@dataclass(frozen=True)
class YatScore:
    """α (q·k + b)² / ((‖q − k‖² + ε) √d); b, α and ε are numbers or (h,).

    Attributes:
      bias: b.
      alpha: α.
      epsilon: ε > 0.
      spherical: q and k are unit vectors.
      distance: see `aether.kernels.yat.yat`.
      nonnegative_bias: see there.
    """

    bias: Array | float = 0.0
    alpha: Array | float = 1.0
    epsilon: Array | float = 1e-5
    spherical: bool = field(default=False, kw_only=True)
    distance: str = field(default="expanded", kw_only=True)
    nonnegative_bias: bool = field(default=False, kw_only=True)

    def __call__(self, q: Array, k: Array) -> Array:
        """Return the scores."""

        def per_head(p: Array | float) -> Array:
            p = jnp.asarray(p, jnp.float32)
            if p.size == 1:
                return p.reshape(())
            heads = q.shape[1:-2]
            if p.shape != (math.prod(heads),):
                raise ValueError(f"bias, alpha or epsilon is {p.shape}; it must be a number or one a head.")
            return p.reshape(*heads, 1, 1)

        return yat(
            q,
            k,
            bias=per_head(self.bias),
            alpha=per_head(self.alpha) / math.sqrt(q.shape[-1]),
            epsilon=per_head(self.epsilon),
            spherical=self.spherical,
            normalized=True,
            transposed=True,
            nonnegative_bias=self.nonnegative_bias,
            distance=self.distance,
            dtype=jnp.dtype("float32"),
        )


def attention(
    q: Array,
    k: Array,
    v: Array,
    score: Score,
    *,
    mask: Mask | None = None,
    normalization: Normalization | None = None,
    impl: str = "plain",
    block: int | None = None,
) -> Array:
    """Return Σ_s w_s v_s with the weights w that `normalization` makes of the scores `mask` admits.

    Args:
      q: (b, t, h, k).
      k: (b, s, g, k) with g dividing h: query head i reads key head i // (h/g).
      v: (b, s, g, any width).
      score: `DotScore` or `YatScore`.
      mask: which keys a query sees; all by default. A query that sees none gets exact zeros.
      normalization: softmax by default.
      impl: "plain" holds all scores and can be differentiated twice; "blockwise" never holds more than a block's. A
        single query, as in decoding, has a single row of scores and always takes "plain".
      block: largest number of queries, and of keys, in a block; 256 by default, fewer if a window is narrow.

    Returns:
      (b, t, h, v's width) in v's dtype; scores and weights are float32, products accumulate in float32.

    Raises:
      ValueError: shapes do not fit one another, the mask does not fit them, or an option is unknown.
    """
    _check_operands(q, k, v)
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    normalization = (normalization or Normalization()).checked()
    check_form(impl, block)
    _check_score(score, normalization)
    mask = (mask or Mask()).checked(b, g, h // g, t, s)
    q = q.reshape(b, t, g, h // g, -1).transpose(0, 2, 3, 1, 4)
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    if impl == "plain" or t == 1:
        y = plain(q, k, v, score, mask, normalization)
    else:
        if isinstance(score, YatScore):  # to save memory is of no use within a block, and costs time
            score = replace(score, nonnegative_bias=False)
        block = block or min(BLOCK, max(64, (mask.window or 4 * BLOCK) // 4))
        y = blockwise(q, k, v, score, mask, normalization, block)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)


def plain(q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization) -> Array:
    """Attend with whole score matrices: q (b, g, r, t, k), k and v (b, g, s, k) -> (b, g, r, t, k)."""
    seen = mask.block(0, q.shape[-2], 0, k.shape[-2])
    if q.shape[2] > 1:
        k, v, heads = k[:, :, None], v[:, :, None], q.shape[1:3]
    else:  # an axis of 1 would cost a fifth of the time on CPU
        q, seen, heads = q[:, :, 0], None if seen is None else seen[:, :, 0], q.shape[1:2]
    weights = normalization.by_head(*heads).weights(score(q, k), seen)
    y = product("...ts,...sk->...tk", weights.astype(v.dtype), v).astype(v.dtype)
    return y if len(heads) > 1 else y[:, :, None]


def check_form(impl: str, block: int | None) -> None:
    """Raise a `ValueError` if there is no such form of attention."""
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}.")
    if block is not None and block < 1:
        raise ValueError(f"block is {block}; it must be at least 1, or None for a size that fits.")


def _check_score(score: Score, normalization: Normalization) -> None:
    if isinstance(score, DotScore) and normalization.name != "softmax":
        raise ValueError(f"normalization is {normalization.name!r}; products may be negative and take only softmax.")


def _check_operands(q: Array, k: Array, v: Array) -> None:
    shapes = f"q, k and v are {q.shape}, {k.shape} and {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{shapes}; they must be (b, t, h, k), (b, s, g, k) and (b, s, g, any).")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}; q's heads, {q.shape[2]}, must be a multiple of k's, {k.shape[2]}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast all to the compute dtype.")
