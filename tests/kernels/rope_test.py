"""Rotary positions against complex multiplication in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from aether.kernels.rope import rotate


def rotated(x, positions, theta=10000.0):
    """Pairs (2i, 2i+1) as complex numbers, times e^(i · position · theta^(−2i/k))."""
    k = x.shape[-1]
    z = x[..., 0::2] + 1j * x[..., 1::2]
    z = z * np.exp(1j * positions[..., None, None] * theta ** (-np.arange(0, k, 2) / k))
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def test_turns_the_pairs(rng):
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 100, (2, 5))
    for theta in (10000.0, 100.0):
        got = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta)
        np.testing.assert_allclose(got, rotated(x, positions, theta), atol=2e-5)


def test_keeps_norms_and_depends_on_the_distance_of_positions_alone(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 4, 2, 8)), jnp.float32) for _ in range(2))
    at = jnp.asarray([[3, 0, 7, 2]])
    np.testing.assert_allclose(jnp.sum(rotate(q, at) ** 2, -1), jnp.sum(q**2, -1), rtol=1e-5)
    near, far = (jnp.einsum("bthk,bshk->bhts", rotate(q, at + o), rotate(k, at + o)) for o in (0, 50))
    np.testing.assert_allclose(near, far, atol=1e-4)
    moved = jnp.einsum("bthk,bshk->bhts", rotate(q, at + 1), rotate(k, at))
    assert float(jnp.abs(moved - near).max()) > 0.1


def test_position_zero_changes_nothing_and_bfloat16_stays(rng):
    x = jnp.asarray(rng.normal(size=(1, 2, 1, 4)), jnp.bfloat16)
    y = rotate(x, jnp.zeros((1, 2), jnp.int32))
    assert y.dtype == jnp.bfloat16 and (y == x).all()


def test_the_gradient_turns_back(rng):
    """rotate is linear, so that Σ g · rotate(y) is the gradient of Σ g · rotate(x) along y."""
    x, y, g = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), jnp.float32) for _ in range(3))
    positions = jnp.asarray(rng.integers(1, 100, (2, 5)))
    gradient = jax.grad(lambda x: jnp.sum(g * rotate(x, positions)))(x)
    np.testing.assert_allclose(
        jnp.sum(gradient * y), jnp.sum(g * rotated(np.asarray(y), np.asarray(positions))), rtol=1e-4
    )
