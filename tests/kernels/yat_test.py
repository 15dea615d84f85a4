"""The ⵟ-product against the formula in float64 by direct differences, its gradients by complex steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.yat import unit, yat, yat_reference

BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}  # times kappa, the condition of the distance
NAMES = ("x", "w", "bias", "alpha", "epsilon")


def formula(x, w, bias, alpha, epsilon, spherical=False):
    """The ⵟ-product in NumPy; no |·| and no maximum, so that it takes complex steps."""
    if spherical:
        x = x / np.sqrt((x * x).sum(-1, keepdims=True))
        w = w / np.sqrt((w * w).sum(-2, keepdims=True))
    gap = x[..., :, :, None] - w[..., None, :, :]
    return alpha * (x @ w + bias) ** 2 / ((gap * gap).sum(-2) + epsilon)


def terms(args, cotangent, spherical):
    """For each argument: its gradient, and the sum of the absolute values of the terms, one an output, in it."""
    found = []
    for i, arg in enumerate(args):
        grad, size = np.zeros(arg.shape), np.zeros(arg.shape)
        for at in np.ndindex(arg.shape):
            stepped = [a.astype(complex) for a in args]
            stepped[i][at] += 1e-30j
            each = cotangent * formula(*stepped, spherical=spherical).imag / 1e-30
            grad[at], size[at] = each.sum(), np.abs(each).sum()
        found.append((grad, size))
    return found


def kappa(x, w, epsilon, spherical):
    """max (‖x‖² + ‖w‖²) / (D + ε), at least 1: by how much the expanded distance may lose."""
    if spherical:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        w = w / np.linalg.norm(w, axis=-2, keepdims=True)
    gap = ((x[..., :, :, None] - w[..., None, :, :]) ** 2).sum(-2)
    size = (x**2).sum(-1)[..., :, None] + (w**2).sum(-2)[..., None, :]
    return max(1.0, float((size / (gap + epsilon)).max()))


def make(rng, shape, negative=False, near=None, epsilon=0.3, heads=False):
    """Arguments of `yat`: dense has b (n,) and single α and ε, heads have (h, 1, 1) of each."""
    m, d, n = shape
    lead = (2,) if heads else ()
    x, w = rng.normal(size=(*lead, m, d)), rng.normal(size=(*lead, d, n))
    if near is not None:
        w[..., :, 0] = x[..., 0, :] + near * rng.normal(size=(*lead, d))
    of_bias, of_rest = ((2, 1, 1), (2, 1, 1)) if heads else ((n,), (1,))
    bias = rng.uniform(-1.5, 0.5, of_bias) if negative else rng.uniform(0.0, 0.5, of_bias)
    return [x, w, bias, rng.uniform(1.0, 3.0, of_rest), epsilon * rng.uniform(0.9, 1.1, of_rest)]


def rounded(args, dtype):
    """What the kernel is given, and the same numbers in float64."""
    given = [jnp.asarray(a, dtype if i < 2 else jnp.float32) for i, a in enumerate(args)]
    return given, [np.asarray(a, np.float64) for a in given]


def run(given, cotangent, **kwargs):
    """Value and gradients of `yat` at `given`."""

    def f(x, w, bias, alpha, epsilon):
        return yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon, **kwargs)

    @jax.jit
    def both(args, g):
        y, back = jax.vjp(f, *args)
        return y, back(g)

    y, grads = both(given, jnp.asarray(cotangent, given[0].dtype))
    return np.asarray(y, np.float64), [np.asarray(g, np.float64) for g in grads]


CASES = [
    pytest.param(dict(), {}, id="dense"),
    pytest.param(dict(negative=True), dict(nonnegative_bias=False), id="negative bias"),
    pytest.param(dict(heads=True), dict(spherical=True), id="spherical heads"),
    pytest.param(
        dict(heads=True, negative=True), dict(spherical=True, nonnegative_bias=False), id="spherical, negative"
    ),
    pytest.param(dict(near=0.05, epsilon=1e-2), {}, id="near"),
    pytest.param(dict(near=0.05, epsilon=1e-2), dict(spherical=True), id="spherical, near"),
    pytest.param(dict(near=0.05, negative=True), dict(nonnegative_bias=False), id="near, negative"),
]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("case", "options"), CASES)
def test_value_and_gradients_are_those_of_the_formula(rng, case, options, dtype):
    given, exact = rounded(make(rng, (5, 6, 4), **case), dtype)
    spherical = options.get("spherical", False)
    bound = BOUNDS[dtype] * kappa(exact[0], exact[1], exact[4].min(), spherical)
    cotangent = np.asarray(jnp.asarray(rng.normal(size=formula(*exact).shape), dtype), np.float64)
    y, grads = run(given, cotangent, **options)
    want = formula(*exact, spherical=spherical)
    assert np.abs(y - want).max() <= bound * np.abs(want).max()
    for name, grad, (right, size) in zip(NAMES, grads, terms(exact, cotangent, spherical), strict=True):
        assert grad.shape == right.shape
        if size.size <= 2:  # one number, or one a head: its terms may cancel
            assert (np.abs(grad - right) <= bound * size).all(), name
        else:
            assert np.linalg.norm(grad - right) <= bound * np.linalg.norm(right), name
