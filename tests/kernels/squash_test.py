"""Ratios of powers: their values against float64, and everything that could overflow or be undefined."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.squash import soft_tanh, softer_sigmoid, softermax

POWERS = (0.5, 1.0, 1.5, 2.0, 3.0)
POINTS = (softer_sigmoid, soft_tanh)
REFERENCES = (lambda p: p / (1 + p), lambda p: (p - 1) / (p + 1))


INSIDE = np.concatenate([np.geomspace(1e-6, 1e6, 49), [1.0, 0.999, 1.001]]).astype(np.float32)
ENDS = np.array([0.0, -0.0, 1e30, 3e38, np.inf], np.float32)
OUTSIDE = np.array([-1.0, -0.5, np.nan], np.float32)


@cache
def pointwise():
    """Return (values, slopes) of both squashers at all powers, (2, powers, points), for each of the three sets."""
    x = np.concatenate([INSIDE, ENDS, OUTSIDE])

    @jax.jit
    def run(x):
        both = [[jax.vmap(jax.value_and_grad(lambda v, f=f, n=n: f(v, n)))(x) for n in POWERS] for f in POINTS]
        return [jnp.stack([jnp.stack([p[i] for p in row]) for row in both]) for i in (0, 1)]

    values, slopes = map(np.asarray, run(x))
    cuts = np.cumsum([len(INSIDE), len(ENDS)])
    return list(zip(np.split(values, cuts, -1), np.split(slopes, cuts, -1), strict=True))


def test_sigmoid_and_tanh_are_their_formulas():
    values, slopes = pointwise()[0]
    for i, reference in enumerate(REFERENCES):
        for j, n in enumerate(POWERS):
            p = INSIDE.astype(np.float64) ** n
            np.testing.assert_allclose(values[i, j], reference(p), rtol=2e-6, atol=2e-7)
            slope = (1 + i) * n * p / INSIDE / (1 + p) ** 2
            np.testing.assert_allclose(slopes[i, j], slope, rtol=1e-5)


def test_the_ends_of_the_domain_are_exact():
    values, slopes = pointwise()[1]
    np.testing.assert_array_equal(values[0], np.tile([0, 0, 1, 1, 1], (5, 1)))
    np.testing.assert_array_equal(values[1], np.tile([-1, -1, 1, 1, 1], (5, 1)))
    at_zero = np.array([0, 1, 0, 0, 0])  # by power: infinite, and set to 0, for the root
    np.testing.assert_array_equal(slopes[:, :, 0], at_zero * [[1], [2]])
    assert (np.abs(slopes[:, :, 2:]) < 1e-20).all()


def test_a_negative_number_counts_as_zero_and_no_number_stays_none():
    values, slopes = pointwise()[2]
    assert (values[0, :, :2] == 0).all() and (values[1, :, :2] == -1).all() and (slopes[:, :, :2] == 0).all()
    assert np.isnan(values[:, :, 2]).all()
    np.testing.assert_array_equal(softermax(jnp.array([-1.0, 1.0, 3.0])), [0.0, 0.25, 0.75])


def reference_softermax(x, n, epsilon, axis=-1):
    p = np.asarray(x, np.float64) ** n
    return p / (epsilon + p.sum(axis, keepdims=True))


@pytest.mark.parametrize("n", POWERS)
def test_softermax_is_its_formula_and_so_is_its_gradient(rng, n):
    x = np.abs(rng.normal(size=(6, 5)) * 10.0 ** rng.uniform(-3, 9, size=(6, 1))).astype(np.float32)
    g = rng.normal(size=x.shape).astype(np.float32)
    epsilon = 1e-6

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: softermax(x, n, epsilon), x)
        return y, pull(g)[0]

    y, got = run(x)
    want = reference_softermax(x, n, epsilon)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    slope = n * want / x * (g - (g * want).sum(-1, keepdims=True))
    scale = (n * want / x * (np.abs(g) + np.abs(g * want).sum(-1, keepdims=True))).max(-1, keepdims=True)
    assert (np.abs(got - slope) <= 1e-5 * scale).all()


def test_softermax_neither_overflows_nor_divides_by_zero():
    rows = jnp.array([[0.0, 0, 0], [1e30, 1e30, 0], [3e38, 0, 0], [1e-30, 0, 0], [1e-12, 1e-12, 0]])
    for n in (0.1, 1.0, 3.0):
        y, slope = jax.jit(lambda x, n=n: (softermax(x, n), jax.grad(lambda x: softermax(x, n)[:, 0].sum())(x)))(rows)
        np.testing.assert_allclose(y, reference_softermax(rows, n, 1e-12), rtol=1e-5, atol=1e-27)
        assert jnp.isfinite(slope).all()


def test_softermax_sums_over_the_axis_asked_for(rng):
    x = np.abs(rng.normal(size=(3, 4))).astype(np.float32)
    for axis in (0, -1, None):
        np.testing.assert_allclose(softermax(x, 2.0, axis=axis).sum(axis), 1.0, rtol=1e-6)


@pytest.mark.parametrize("f", [softermax, softer_sigmoid, soft_tanh])
def test_keeps_the_dtype_and_computes_in_float32(rng, f):
    x = jnp.asarray(np.abs(rng.normal(size=300)) * 3, jnp.bfloat16)
    y = f(x, 3.0)
    assert y.dtype == "bfloat16"
    np.testing.assert_array_equal(y, f(x.astype(jnp.float32), 3.0).astype(jnp.bfloat16))


@pytest.mark.parametrize("f", [softermax, softer_sigmoid, soft_tanh])
def test_bad_input_is_named(f):
    for n in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"n is {n}"):
            f(jnp.ones(3), n)
    with pytest.raises(ValueError, match="int32"):
        f(jnp.ones(3, jnp.int32))
    for epsilon in (0.0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon}"):
            softermax(jnp.ones(3), epsilon=epsilon)


@pytest.mark.parametrize("n", [1.0, 2.0])
def test_equals_nmn_where_that_is_finite(rng, n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("nmn.nnx", reason="the [parity] extra installs nmn to compare with")
    x = jnp.asarray(np.abs(rng.normal(size=(4, 5))), jnp.float32)
    for ours in (softermax, softer_sigmoid, soft_tanh):
        np.testing.assert_allclose(ours(x, n), getattr(theirs, ours.__name__)(x, n), rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(softermax(x, n, axis=0), theirs.softermax(x, n, axis=0), rtol=2e-6)
