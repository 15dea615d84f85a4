"""Scores: what compares queries and keys, described, so that each form of attention may compute it in its own way.

Axes: b batch, t query, s key, h heads, g key/value heads, r = h/g query heads a key/value head, k head width.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.yat import product, yat


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
