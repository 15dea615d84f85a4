"""Scores, masks and the weighted mean of values against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.attention import causal_mask, dot_scores, weighted_values, yat_scores

UNIT = dict(bias=np.array([0.1, 0.4]), alpha=np.array([8.0, 3.0]), epsilon=np.array([0.3, 0.6]))


def make(rng, t=5, s=5):
    return [np.asarray(rng.normal(size=(2, n, 2, 4)), np.float32) for n in (t, s, s)]


def wanted_scores(kind, q, k):
    """One score at a time."""
    b, t, h, d = q.shape
    q, k = q.astype(float), k.astype(float)
    scores = np.zeros((b, h, t, k.shape[1]))
    for i, head, row, column in np.ndindex(scores.shape):
        x, w = q[i, row, head], k[i, column, head]
        if kind == "dot":
            score = x @ w
        else:
            if kind == "spherical":
                x, w = x / np.linalg.norm(x), w / np.linalg.norm(w)
            gap = np.sum((x - w) ** 2) + UNIT["epsilon"][head]
            score = UNIT["alpha"][head] * (x @ w + UNIT["bias"][head]) ** 2 / gap
        scores[i, head, row, column] = score / np.sqrt(d)
    return scores


def scores_of(kind, q, k):
    unit = {name: jnp.asarray(v, jnp.float32) for name, v in UNIT.items()}
    return dot_scores(q, k) if kind == "dot" else yat_scores(q, k, spherical=kind == "spherical", **unit)


def wanted_values(scores, v, mask):
    y = np.zeros((scores.shape[0], scores.shape[2], scores.shape[1], v.shape[-1]))
    for i, head, row in np.ndindex(scores.shape[:3]):
        seen = np.broadcast_to(mask, scores.shape)[i, head, row]
        if seen.any():
            weights = np.exp(scores[i, head, row, seen] - scores[i, head, row, seen].max())
            y[i, row, head] = weights / weights.sum() @ v[i, seen, head]
    return y


@pytest.mark.parametrize("kind", ["dot", "plain", "spherical"])
def test_scores(rng, kind):
    q, k, _ = make(rng, 3, 5)
    got = scores_of(kind, jnp.asarray(q), jnp.asarray(k))
    np.testing.assert_allclose(got, wanted_scores(kind, q, k), rtol=1e-4, atol=1e-5)
    half = scores_of(kind, jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16))
    assert half.dtype == "float32"
    np.testing.assert_allclose(half, got, atol=0.1 * float(jnp.abs(got).max()))


def test_values_are_averaged_over_the_keys_that_the_mask_admits(rng):
    scores, v = rng.normal(size=(2, 2, 5, 5)) * 5, rng.normal(size=(2, 5, 2, 4))
    mask = rng.random((2, 1, 5, 5)) < 0.5
    mask[0, 0, 2] = False
    got = weighted_values(jnp.asarray(scores, jnp.float32), jnp.asarray(v, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(got, wanted_values(scores, v, mask), atol=1e-5)
    assert (np.asarray(got)[0, 2] == 0).all()


def test_a_row_that_sees_nothing_is_zero_with_a_finite_gradient(rng):
    q, k, v = (jnp.asarray(a) for a in make(rng))
    mask = jnp.zeros((1, 1, 5, 5), bool).at[..., 0, 0].set(True)
    f = lambda *a: jnp.sum(weighted_values(scores_of("plain", *a[:2]), a[2], mask) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in grads)
    assert all((g[:, 1:] == 0).all() for g in grads)


@pytest.mark.parametrize("kind", ["dot", "plain", "spherical"])
def test_no_query_feels_a_later_key(rng, kind):
    """Causality by gradient: d(output at t)/d(key or value at s) is zero for s > t, and not for s ≤ t."""
    q, k, v = (jnp.asarray(a) for a in make(rng))

    def f(k, v):
        return jnp.sum(weighted_values(scores_of(kind, q, k), v, causal_mask(5, 5)) ** 2, (0, 2, 3))

    for jacobian in jax.jit(jax.jacobian(f, (0, 1)))(k, v):
        felt = np.abs(jacobian).sum((1, 3, 4)) > 0
        later = ~np.tri(5, dtype=bool)
        assert not felt[later].any() and felt[1:][~later[1:]].all() and felt.any()


def test_the_causal_mask_is_offset_by_what_came_before():
    assert (causal_mask(3, 3) == np.tri(3)).all()
    assert (causal_mask(2, 6, 3) == np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])).all()
    assert (causal_mask(2, 6, jnp.asarray(3)) == causal_mask(2, 6, 3)).all()
