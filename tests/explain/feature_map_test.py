"""The finite feature map in float64: what is exact, what is unbiased, the bound, and a layer as a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.feature_map import draw, features_of, linearised, monomials, table
from aether.nn import YatNMN
from tools import reference


def kernel(x, w, bias, epsilon, spherical=False):
    return reference.yat(x, w.T, bias=bias, epsilon=epsilon, spherical=spherical)


def drawn_layer(rng, **options):
    layer = YatNMN(4, 5, epsilon=0.5, rngs=nnx.Rngs(0), **options)
    state = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, jnp.float32), nnx.state(layer))
    nnx.update(layer, state)
    return layer


@pytest.mark.parametrize("d", [1, 2, 7])
def test_the_numerator_is_exact(rng, d):
    x, w, b = rng.normal(size=(6, d)), rng.normal(size=(5, d)), 0.3
    assert monomials(x, 0.0).shape == (6, (d + 1) * (d + 2) // 2)
    np.testing.assert_allclose(monomials(x, b**0.5) @ monomials(w, b**0.5).T, (x @ w.T + b) ** 2, rtol=1e-10)
    each = rng.normal(size=5)
    np.testing.assert_allclose(monomials(x, 1.0) @ monomials(w, each).T, (x @ w.T + each) ** 2, atol=1e-12)


@pytest.mark.parametrize("spherical", [False, True])
def test_the_map_is_one_map_and_its_product_needs_no_features(rng, spherical):
    x, w, b = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)), 0.3
    features = draw(3, 16, 0.2, spherical=spherical)
    phi, psi = features(x, b**0.5), features(w, b**0.5)
    assert phi.shape == (6, features.size) == (6, 4 * 5 * 16) and phi.dtype == np.float64
    np.testing.assert_allclose(phi @ psi.T, features.product(x, w, b), rtol=1e-10)
    own = kernel(x, x, b, 0.2, spherical)
    np.testing.assert_allclose(np.sum(phi**2, -1), np.diag(own), rtol=1e-9)  # at D = 0 every wave is 1: exact


@pytest.mark.parametrize("spherical", [False, True])
def test_the_mean_over_draws_is_the_kernel(rng, spherical):
    """The mean of 400 draws is within five of its standard errors, and those are small."""
    x, w = rng.normal(size=(4, 3)), rng.normal(size=(3, 3))
    want = kernel(x, w, 0.3, 0.5, spherical)
    draws = np.stack([draw(3, 64, 0.5, spherical=spherical, seed=s).product(x, w, 0.3) for s in range(400)])
    error = np.std(draws, 0) / 20
    assert np.all(np.abs(draws.mean(0) - want) <= 5 * error)
    assert np.all(error <= 0.01 * (1 + want) * np.max(want))


def test_the_error_keeps_the_bound_and_falls_as_the_root_of_the_waves(rng):
    x, w, b = rng.normal(size=(30, 4)) / 2, rng.normal(size=(20, 4)) / 2, 0.2
    want, kept, errors = kernel(x, w, b, 0.3), [], []
    for waves in (100, 10_000):
        size = []
        for seed in range(20):
            features = draw(4, waves, 0.3, seed=seed)
            error = np.abs(features.product(x, w, b) - want)
            kept.append(np.all(error <= features.bound(x, w, b, delta=0.01)))
            size.append(np.linalg.norm(error))
        errors.append(np.median(size))
    assert np.mean(kept) >= 0.97, "a draw leaves the bound with a probability of at most 0.01"
    assert 7 < errors[0] / errors[1] < 14
    assert np.max(error / features.bound(x, w, b, delta=0.01)) > 0.1, "a bound that says something"


def test_strata_lower_the_error(rng):
    """Where D is large the waves differ by t most; a plain draw of t is what they are compared with."""
    x, w = np.zeros((1, 1)), np.full((1, 1), 0.5)
    strata = [draw(1, 64, 0.5, seed=s) for s in range(300)]
    t = rng.exponential(2.0, size=(300, 64, 1))
    plain = np.cos(0.5 * np.sqrt(2 * t) * rng.normal(size=t.shape)).mean((1, 2)) / 0.5
    ours = np.array([f.product(x, w, 1.0)[0, 0] for f in strata])
    assert np.std(ours) < 0.95 * np.std(plain) and abs(ours.mean() - plain.mean()) < 0.05


@pytest.mark.parametrize("options", [dict(), dict(spherical=True, softplus_bias=True, bias_init=0.1)])
def test_a_layer_is_a_linear_model_of_features(rng, options):
    """With biases of its own for each unit, below 0 too; the table is what the model does."""
    layer, x = drawn_layer(rng, **options), rng.normal(size=(12, 4)).astype(np.float32) / 2
    model = linearised(layer, features_of(layer, 3000))
    assert model.weights.shape == (model.features.size, 5) == (90_000, 5)
    w, unit = np.asarray(layer.kernel[...], np.float64), layer.unit()
    bias, alpha = np.asarray(unit["bias"], np.float64), np.float64(unit["alpha"][0])
    want = reference.yat(x, w, bias=bias, alpha=alpha, epsilon=0.5, spherical=layer.spherical)
    got = model(x)
    rows = table(layer, x, [30, 3000])
    assert rows[1]["error"] == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-6)
    assert rows[1]["largest"] == pytest.approx(np.abs(got - want).max(), rel=1e-6)
    assert rows[1]["error"] < 0.1 and rows[1]["error"] < rows[0]["error"]
    assert all(row["largest"] <= row["bound"] for row in rows)
    assert [row["features"] for row in rows] == [900, 90_000]


def test_what_does_not_fit_is_refused(rng):
    layer = drawn_layer(rng)
    with pytest.raises(InputError, match=r"4 wide with ε = 0.2 .* layer 4 wide with ε = 0.5"):
        linearised(layer, draw(4, 2, 0.2))
    with pytest.raises(InputError, match=r"0 waves and ε = 0.2"):
        draw(4, 0, 0.2)
    with pytest.raises(InputError, match="zero vector has no direction"):
        draw(4, 2, 0.2, spherical=True)(np.zeros((1, 4)), 1.0)
