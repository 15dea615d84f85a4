"""Attention over whole score matrices: masks, scores, and the weighted mean of values.

Axes: b batch, t query, s key, h heads, k head width.
"""

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.yat import yat


def causal_mask(t: int, s: int, offset: Array | int = 0) -> Array:
    """Return (t, s) booleans: query i, at position offset + i, sees keys 0 … offset + i."""
    return jnp.arange(s) <= jnp.arange(t)[:, None] + offset


def dot_scores(q: Array, k: Array) -> Array:
    """Return q·k / √d in float32, (b, h, t, s), from (b, t, h, k) and (b, s, h, k)."""
    return jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5


def yat_scores(
    q: Array,
    k: Array,
    *,
    bias: Array | float,
    alpha: Array | float,
    epsilon: Array | float,
    spherical: bool,
    normalized: bool = False,
    nonnegative_bias: bool = True,
) -> Array:
    """Return α (q·k + b)² / ((‖q − k‖² + ε) √d) in float32, (b, h, t, s); b ≥ 0, α and ε are (h,).

    `spherical` and `normalized` as in `aether.kernels.yat.yat`.
    """

    def per_head(p: Array | float) -> Array:
        return jnp.asarray(p)[..., None, None]

    return yat(
        q.transpose(0, 2, 1, 3),
        k.transpose(0, 2, 1, 3),
        bias=per_head(bias),
        alpha=per_head(alpha) / q.shape[-1] ** 0.5,
        epsilon=per_head(epsilon),
        spherical=spherical,
        normalized=normalized,
        transposed=True,
        nonnegative_bias=nonnegative_bias,
        dtype=jnp.dtype("float32"),
    )


def weighted_values(scores: Array, v: Array, mask: Array) -> Array:
    """Return softmax(scores over the keys that `mask` admits) · v.

    Args:
      scores: (b, h, t, s) float32.
      v: (b, s, h, k).
      mask: booleans broadcastable to the scores; a query with no admitted key gets exact zeros.

    Returns:
      (b, t, h, k) in v's dtype.
    """
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    weights = jnp.where(mask, weights, 0.0).astype(v.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights, v)
