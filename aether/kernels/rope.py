"""Rotary positions (Su et al., 2021, arXiv 2104.09864)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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
    return _turn(theta, x, positions)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(theta, x, positions):
    k = x.shape[-1]
    frequency = theta ** (-(jnp.arange(k) // 2 * 2).astype(jnp.float32) / k)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    # (−x₁, x₀) of each pair by a product: on a TPU it costs a third of what taking strided halves apart costs.
    quarter = jnp.asarray(np.kron(np.eye(k // 2), [[0, 1], [-1, 0]]), x.dtype)
    turned = jnp.einsum("bthk,kj->bthj", x, quarter, preferred_element_type=jnp.float32, precision="highest")
    return (x.astype(jnp.float32) * jnp.cos(angle) + turned * jnp.sin(angle)).astype(x.dtype)


# The gradient turns back. It is written down, lest a remat policy that keeps products keeps this one.
_turn.defvjp(
    lambda theta, x, positions: (_turn(theta, x, positions), positions),
    lambda theta, positions, g: (_turn(theta, g, -positions), None),
)
