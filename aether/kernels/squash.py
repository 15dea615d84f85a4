"""Squashers of what is never negative, such as the responses of ⵟ units: ratios of powers, no exponentials.

`softermax(x)_i = x_iⁿ / (ε + Σ x_jⁿ)`, `softer_sigmoid(x) = xⁿ / (1 + xⁿ)`, `soft_tanh(x) = (xⁿ − 1) / (xⁿ + 1)`

Names and arguments are nmn's. The domain is x ≥ 0; a negative x counts as 0, with a zero gradient (nmn's values there
depend on the parity of n, have a pole at x = −1 for odd n, and are NaN for a fractional one). Powers are taken of
min(x, 1/x), or of x over its maximum, so that nothing overflows. For n < 1 the slope at x = 0 is infinite: the
gradient there is set to 0, which keeps the products of the chain rule defined.

The arithmetic is float32, or float64 where x is; results have x's dtype.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

_RANGE = 1e-30, 1e37  # of what is divided by: its reciprocal is a normal number too


def softermax(x: Array, n: float = 1.0, epsilon: float = 1e-12, axis: int | None = -1) -> Array:
    """Return xⁿ / (ε + Σ xⁿ), the sum along `axis`, or over all of x if it is None.

    Weights that add up to at most 1; zeros where all of x is 0, where the slope is 1/ε for n = 1.

    Raises:
      ValueError: n or ε is not a positive finite number, or x holds no floating numbers.
    """
    x32, dtype = _operand(x, n)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon}; it must be a positive finite number, such as 1e-12.")
    least = max(epsilon ** (1.0 / n), _RANGE[0])
    largest = jnp.max(x32, axis, keepdims=True)
    scale = jax.lax.stop_gradient(jnp.clip(largest, least, _RANGE[1]))  # cancels in the ratio
    power = _power(x32 / scale, n)
    return (power / (epsilon * scale**-n + jnp.sum(power, axis, keepdims=True))).astype(dtype)


def softer_sigmoid(x: Array, n: float = 1.0) -> Array:
    """Return xⁿ / (1 + xⁿ), elementwise: 0 at 0, ½ at 1, towards 1; errors as in `softermax`."""
    power, large, dtype = _small_power(x, n)
    return (jnp.where(large, 1.0, power) / (1.0 + power)).astype(dtype)


def soft_tanh(x: Array, n: float = 1.0) -> Array:
    """Return (xⁿ − 1) / (xⁿ + 1), elementwise: −1 at 0, 0 at 1, towards 1; errors as in `softermax`."""
    power, large, dtype = _small_power(x, n)
    return (jnp.where(large, 1.0 - power, power - 1.0) / (1.0 + power)).astype(dtype)


def _operand(x: Array, n: float) -> tuple[Array, jnp.dtype]:
    if not (math.isfinite(n) and n > 0):
        raise ValueError(f"n is {n}; it must be a positive finite number, such as 1.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; cast it to a floating dtype such as float32.")
    return jnp.where(x < 0, 0.0, x).astype(jnp.promote_types(x.dtype, jnp.float32)), x.dtype


def _small_power(x: Array, n: float) -> tuple[Array, Array, jnp.dtype]:
    """Return min(x, 1/x)ⁿ, where it is the power of 1/x, and x's dtype."""
    x32, dtype = _operand(x, n)
    large = x32 > 1
    return _power(jnp.where(large, 1.0 / jnp.where(large, x32, 1.0), x32), n), large, dtype


def _power(r: Array, n: float) -> Array:
    """Return rⁿ of r ≥ 0, with a zero gradient at 0 if n < 1."""
    if n >= 1:
        return r**n
    return jnp.where(r == 0, 0.0, jnp.where(r == 0, 1.0, r) ** n)
