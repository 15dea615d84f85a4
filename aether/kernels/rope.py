"""Rotary positions (Su et al., 2021, arXiv 2104.09864)."""

import math

import jax.numpy as jnp
from jax import Array


def rotate(x: Array, positions: Array, theta: float = 10000.0) -> Array:
    """Rotate the pairs (2i, 2i+1) of each head by position · theta^(−2i/k).

    Args:
      x: (b, t, h, k) with k even.
      positions: (b, t) integers.
      theta: base of the wavelengths.
    """
    if not 0 < theta < math.inf:
        raise ValueError(f"theta is {theta}; it must be a positive finite number, such as 10000.")
    k = x.shape[-1]
    frequency = theta ** (-jnp.arange(0, k, 2, dtype=jnp.float32) / k)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)
