import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.features import anchored, check, coefficients, fit_anchors, haar, kernel, slay, taylor

B, E, D = 0.5, 1.0, 8
OPTIONS = dict(bias=B, epsilon=E)


def kappa(s, bias=B, epsilon=E):
    """κ in float64, on its own."""
    s = np.asarray(s, np.float64)
    return (s + bias) ** 2 / (2 + epsilon - 2 * s)


def cut(s, degree, bias=B, epsilon=E):
    """κ's Taylor polynomial, its coefficients by multiplying (s + b)² with the series of 1/(C − 2s)."""
    c = 2 + epsilon
    geometric = np.array([(2 / c) ** n / c for n in range(degree + 1)])
    a = np.convolve([bias**2, 2 * bias, 1], geometric)[: degree + 1]
    return np.polynomial.polynomial.polyval(np.asarray(s, np.float64), a)


@pytest.fixture
def x(rng):
    """Six unit vectors, two of them equal and two opposite."""
    x = rng.normal(size=(6, D))
    x[1], x[3] = x[0], -x[2]
    x[4] = x[0] + 0.3 * x[4]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@jax.jit
def mapped(phi, x):
    return phi(x)


def gram(x):
    return np.asarray(x, np.float64) @ np.asarray(x, np.float64).T


def mean_of_draws(make, x, count=1500):
    """Return mean and standard error of φ(x)·φ(x)ᵀ over draws of the features."""

    def one(key):
        phi = make(key)(x)
        return phi @ phi.T

    grams = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count)), np.float64)
    return grams.mean(0), grams.std(0) / count**0.5


def assert_within(mean, error, truth, deviations=4.5):
    assert np.all(np.abs(mean - truth) <= deviations * error + 1e-5)


def test_kernel_and_its_series():
    s = np.linspace(-0.9, 0.9, 13)
    np.testing.assert_allclose(kernel(s, B, E), kappa(s), rtol=1e-12)
    np.testing.assert_allclose(np.polynomial.polynomial.polyval(s, coefficients(B, E, 4)), cut(s, 3), rtol=1e-12)
    assert min(coefficients(0.0, 0.1, 30)) >= 0


def test_taylor_with_all_products_is_exact_to_degree_two(x):
    phi = taylor(jax.random.key(1), D, 1 + D + D * (D + 1) // 2, tail_probability=0.0, **OPTIONS)
    features = np.asarray(mapped(phi, x), np.float64)
    assert features.shape == (6, 45)
    np.testing.assert_allclose(features @ features.T, cut(gram(x), 2), atol=2e-6)
    assert (features @ features.T).min() > 0


def test_taylor_with_a_tail_is_unbiased(x):
    def make(key):
        return taylor(key, D, 35, tail_probability=0.3, tail_features=10, **OPTIONS)

    mean, error = mean_of_draws(make, x)
    assert_within(mean, error, kappa(gram(x)))
    assert error.max() < 0.14  # κ(1) − its part of degree 2 is 0.9
    assert np.abs(mean - cut(gram(x), 2)).max() > 5 * error.max()


def test_taylor_without_tail_is_unbiased_for_the_cut_kernel(x):
    mean, error = mean_of_draws(lambda key: taylor(key, D, 30, tail_probability=0.0, **OPTIONS), x)
    assert_within(mean, error, cut(gram(x), 2))
    assert error.max() < 0.015


def test_the_tail_comes_with_its_probability():
    keys = jax.random.split(jax.random.key(3), 4000)
    strength = jax.jit(jax.vmap(lambda key: taylor(key, D, 30, tail_probability=0.1, **OPTIONS).strength))(keys)
    assert abs(float(np.mean(np.asarray(strength) > 0)) - 0.1) < 0.02
    np.testing.assert_allclose(np.unique(strength), [0, 10**0.5], rtol=1e-5)


def test_slay_has_the_mean_its_docstring_gives_and_is_positive(x):
    def make(key):
        return slay(key, D, 32, nodes=2, anchors=4, **OPTIONS)

    mean, error = mean_of_draws(make, x)
    s = gram(x)
    t, w = np.polynomial.laguerre.laggauss(2)
    waves = sum(wi / 3 * np.exp(2 * ti / 3 * s) for ti, wi in zip(t, w, strict=True))  # C = 3
    assert_within(mean, error, waves * ((1 + B) ** 2 + 2 * (s + B) ** 2) / 3)
    features = jax.jit(lambda x: make(jax.random.key(0))(x))(x)
    assert features.shape == (6, 32) and float(features.min()) >= 0


def test_anchored_is_exact_at_its_anchors_and_to_degree_one(x, rng):
    features = np.asarray(mapped(anchored(3.0 * jnp.asarray(x), **OPTIONS), x), np.float64)
    np.testing.assert_allclose(features @ features.T, kappa(gram(x)), atol=3e-4)
    low = features[:, : 1 + D]
    np.testing.assert_allclose(low @ low.T, cut(gram(x), 1), atol=1e-6)


def test_anchored_is_below_the_kernel_by_a_psd_remainder(rng):
    x, z = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(20, D)), rng.normal(size=(5, D))))
    phi = anchored(jnp.asarray(z, jnp.float32), **OPTIONS)
    features = np.asarray(mapped(phi, jnp.asarray(x, jnp.float32)), np.float64)
    missing = kappa(gram(x)) - features @ features.T
    assert np.linalg.eigvalsh(missing).min() > -1e-4
    assert np.trace(missing) > 0.1


def test_gradients_are_finite_at_zero_and_reach_the_anchors(x):
    maps = [
        slay(jax.random.key(0), D, 64, **OPTIONS),
        taylor(jax.random.key(0), D, 20, tail_probability=1.0, **OPTIONS),
        anchored(jnp.asarray(x), bias=0.0, epsilon=0.1),
    ]
    both = jnp.concatenate([jnp.zeros((1, D)), jnp.asarray(x)])

    @jax.jit
    def gradients(maps, x):
        return [jax.grad(lambda f, x: jnp.sum(jnp.tanh(f(x))), (0, 1), allow_int=True)(f, x) for f in maps]

    found = gradients(maps, both)
    for of_map, of_x in found:
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(of_map)) and jnp.isfinite(of_x).all()
        assert float(jnp.abs(of_x).max()) > 0
    assert float(jnp.abs(found[2][0].anchors).max()) > 0


def test_anchors_find_the_clusters(rng):
    centres = np.linalg.qr(rng.normal(size=(D, D)))[0][:3]
    data = np.repeat(centres, 40, 0) + 0.05 * rng.normal(size=(120, D))
    found = np.asarray(jax.jit(fit_anchors, static_argnums=2)(jax.random.key(0), jnp.asarray(data, jnp.float32), 12))
    assert found.shape == (12, D)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found @ centres.T).max(0).min() > 0.99


def test_directions_are_rotations_in_every_orientation():
    q = np.asarray(jax.jit(haar, static_argnums=(1, 2))(jax.random.key(0), 200, 5), np.float64)
    np.testing.assert_allclose(q @ q.swapaxes(1, 2), np.broadcast_to(np.eye(5), q.shape), atol=1e-6)
    assert abs(np.mean(q, 0)).max() < 0.15
    assert abs(np.mean(np.linalg.det(q) > 0) - 0.5) < 0.15


def test_maps_are_pytrees_of_arrays():
    phi = taylor(jax.random.key(0), D, 20, **OPTIONS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(phi))
    assert phi.floor == pytest.approx(0.1 * (coefficients(B, E, 3)[0] + coefficients(B, E, 3)[2] / D))
    assert dataclasses.replace(phi, strength=jnp.zeros(())).bias == B


def test_quality_of_attention_outputs(rng):
    """A short form of the study: one draw, 512 positions, two rows of its table, with slack."""
    width, length, options = 64, 512, dict(bias=0.1, epsilon=0.1)

    def outputs(weights, v):
        return weights @ v / weights.sum(1, keepdims=True)

    maps = jax.jit(
        lambda key: (
            slay(key, width, 1024, **options),
            taylor(key, width, 1024, tail_probability=0.0, **options),
            taylor(key, width, 2145, tail_probability=0.0, **options),
        )
    )(jax.random.key(1))
    for cosine, least in ((0.0, (0.1, 0.7, 0.9)), (0.7, (0.1, 0.9, 0.9))):
        centres = rng.normal(size=(8, width)) / 8

        def draw(n, cosine=cosine, centres=centres):
            x = (1 - cosine) ** 0.5 * rng.normal(size=(n, width)) / 8
            x += cosine**0.5 * centres[rng.integers(0, 8, n)]
            return x / np.linalg.norm(x, axis=1, keepdims=True)

        q, k, other, v = draw(length), draw(length), draw(1024), rng.normal(size=(length, 64))
        anchors = jax.jit(fit_anchors, static_argnums=2)(jax.random.key(2), jnp.asarray(other, jnp.float32), 256)
        exact = outputs(kappa(q @ k.T, **options), v)
        scores = []
        for phi in (*maps, anchored(anchors, **options)):
            features = np.asarray(mapped(phi, jnp.asarray(np.stack([q, k]), jnp.float32)), np.float64)
            approximate = outputs(features[0] @ features[1].T, v)
            scores.append(np.vdot(approximate, exact) / np.linalg.norm(approximate) / np.linalg.norm(exact))
        uniform = np.vdot(np.tile(v.mean(0), (length, 1)), exact) / np.linalg.norm(exact) / length**0.5
        uniform /= np.linalg.norm(v.mean(0))
        assert scores[1] > scores[0] + 0.1 and scores[1] > uniform + 0.1, scores
        assert all(score > bound for score, bound in zip(scores, least, strict=False)), scores
        assert scores[3] > (0.6, 0.9)[cosine > 0], scores


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda k: check(8, -0.1, 1.0), "bias is -0.1"),
        (lambda k: check(8, 1.0, 0.0), "epsilon is 0.0"),
        (lambda k: check(8, 1.0, float("nan")), "epsilon is nan"),
        (lambda k: check(1, 1.0, 1.0), "width is 1"),
        (lambda k: slay(k, 8, 100, **OPTIONS), "num_features is 100 .* multiple of 32"),
        (lambda k: taylor(k, 8, 47, **OPTIONS), "num_features is 47 at width 8; .* from 11 to 46"),
        (lambda k: taylor(k, 8, 20, tail_probability=2.0, **OPTIONS), "tail_probability is 2.0"),
        (lambda k: taylor(k, 8, 20, tail_features=0, **OPTIONS), "tail_features is 0"),
        (lambda k: anchored(jnp.zeros(8), **OPTIONS), r"anchors have shape \(8,\)"),
        (lambda k: fit_anchors(k, jnp.zeros((3, 8)), 4), "num_anchors is 4"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make(jax.random.key(0))
