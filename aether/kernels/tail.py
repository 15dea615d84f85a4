"""The tail of a ⵟ-product, from x·w to u = (x·w + b)² / (D + ε) and back, elementwise.

The backward pass keeps one number an output: u with the sign of n = x·w + b in its sign bit. All that gradients need of
it is t = n/Q, where Q = D + ε: with S = ‖x‖² + ‖w‖² and c = S + 2b + ε, Q is c/(1 + 2t), so that t² − 2vt − v = 0 with
v = u/c, and the sign says which root. For a gradient g of u, those of n, Q and x·w are 2gt, −gt² and 2gt(1 + t), the
last one 2gt where the distance is clamped and has no gradient.

Rounding u to bfloat16 costs less accuracy than rounding x·w: the error of n is that of u divided by 2 + 2t. Where b may
be negative the root is not determined, and the float32 x·w is kept instead.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

FLOOR = 4 * 2.0**-23  # of S: what float32 sums resolve
_LARGE = 1e18  # the square of v is finite up to here; t > 1e7 means that the distance is clamped


def floor_of(dtype: jnp.dtype, unit: bool) -> float:
    """Return the least distance that an expansion resolves, in parts of S; unit vectors of this dtype were rounded."""
    return max(FLOOR, float(jnp.finfo(dtype).eps) / 20) if unit else FLOOR


class Tail(NamedTuple):
    """What is known of a tail when it is traced.

    Attributes:
      nonnegative_bias: keep the signed u in `dtype`, else x·w in float32.
      dtype: the compute dtype.
      floor: the rounding error of the distance, in parts of S.
    """

    nonnegative_bias: bool
    dtype: jnp.dtype
    floor: float = FLOOR

    def respond(self, dot: Array, s: Array | float, bias: Array, epsilon: Array) -> tuple[Array, Array]:
        """Return u = n²/Q with Q = max(S − 2 x·w, floor·S) + ε, and what the backward pass keeps."""
        n = dot + bias
        signed = n * jnp.abs(n) / (jnp.maximum(s - 2.0 * dot, self.floor * s) + epsilon)
        return jnp.abs(signed), signed.astype(self.dtype) if self.nonnegative_bias else dot

    def response(self, kept: Array, s: Array | float, bias: Array, epsilon: Array) -> Array:
        """Return u of what was kept, in the compute dtype."""
        return jnp.abs(kept) if self.nonnegative_bias else self.respond(kept, s, bias, epsilon)[0].astype(self.dtype)

    def recover(self, kept: Array, s: Array | float, bias: Array, epsilon: Array) -> tuple[Array, Array, Array]:
        """Return u, t = n/Q, and t where the distance is not clamped, 0 elsewhere, of what was kept."""
        least = self.floor * s
        if not self.nonnegative_bias:
            n, distance = kept + bias, s - 2.0 * kept
            t = n / (jnp.maximum(distance, least) + epsilon)
            return n * t, t, jnp.where(distance > least, t, 0.0)
        signed = kept.astype(jnp.float32)
        u, c = jnp.abs(signed), s + 2.0 * bias + epsilon
        v = jnp.minimum(u * (1.0 / c), _LARGE)
        root = jnp.sqrt(v * (v + 1.0))
        t = v + jnp.where(signed < 0, -root, root)
        return u, t, jnp.where((1.0 + 2.0 * t) * (least + epsilon) < c, t, 0.0)


def sum_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum `g` over the axes along which an operand of `shape` was broadcast."""
    g = jnp.sum(g, tuple(range(g.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and g.shape[i] != 1)
    return jnp.sum(g, axes, keepdims=True)
