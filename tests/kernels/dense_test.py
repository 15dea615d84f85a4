"""The ⵟ-MLP against its formula in float64, differentiated by JAX; what it keeps; how it meets rematerialisation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.yat import yat, yat_mlp

NAMES = ("x", "w", "out", "bias", "alpha", "epsilon")
BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}  # times the condition
SHAPE = (2, 9, 12, 20, 7)  # rows, positions, width, hidden, out


def formula(x, w, out, bias, alpha, epsilon, spherical):
    """Differences instead of products, nothing kept, nothing clamped."""
    if spherical:
        x, w = (v / jnp.sqrt(jnp.sum(v * v, axis, keepdims=True)) for v, axis in ((x, -1), (w, 0)))
    distance = jnp.sum((x[..., None] - w) ** 2, -2)
    return (alpha * (x @ w + bias) ** 2 / (distance + epsilon)) @ out


def make(rng, negative=False, near=False):
    b, t, d, n, e = SHAPE
    x, w, out = rng.normal(size=(b, t, d)), rng.normal(size=(d, n)), rng.uniform(0.5, 1.5, (n, e))
    if near:
        w[:, 0] = x[0, 0] + 0.1 * rng.normal(size=d)
    bias = rng.normal(size=n) if negative else rng.uniform(0.0, 0.5, n)
    return [x, w, out, bias, np.array([1.7]), np.array([0.2])]


def condition(x, w, epsilon, spherical):
    """(‖x‖² + ‖w‖²)/(D + ε) at its largest: by how much the expanded distance may lose."""
    if spherical:
        x, w = x / np.linalg.norm(x, axis=-1, keepdims=True), w / np.linalg.norm(w, axis=0)
    size = (x**2).sum(-1)[..., None] + (w**2).sum(0)
    return float((size / (((x[..., None] - w) ** 2).sum(-2) + epsilon)).max())


def exact(args, g, spherical):
    with jax.enable_x64(True):
        y, back = jax.vjp(partial(formula, spherical=spherical), *(jnp.asarray(a, jnp.float64) for a in args))
        return np.asarray(y), [np.asarray(a) for a in back(jnp.asarray(g, jnp.float64))]


def ours(x, w, out, bias, alpha, epsilon, **how):
    return yat_mlp(x, w, out, bias=bias, alpha=alpha, epsilon=epsilon, **how)


def given(args, dtype):
    return [jnp.asarray(a, dtype if i < 3 else jnp.float32) for i, a in enumerate(args)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("case", [dict(), dict(negative=True), dict(near=True)], ids=["", "negative", "near"])
def test_value_and_gradients(rng, case, spherical, dtype):
    args = given(make(rng, **case), dtype)
    g = jnp.asarray(rng.uniform(0.5, 1.5, (*SHAPE[:2], SHAPE[-1])), dtype)  # what is summed to one number adds up
    how = dict(spherical=spherical, nonnegative_bias=not case.get("negative", False))

    @jax.jit
    def both(args, g):
        y, back = jax.vjp(partial(ours, **how), *args)
        return y, back(g)

    y, grads = both(args, g)
    assert y.dtype == dtype and [a.dtype for a in grads] == [a.dtype for a in args]
    right, right_grads = exact(args, g, spherical)
    x, w, epsilon = (np.asarray(args[i], np.float64) for i in (0, 1, 5))
    bound = BOUNDS[dtype] * condition(x, w, epsilon, spherical)
    for name, a, b in zip(("y", *NAMES), (y, *grads), (right, *right_grads), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b)
        assert error <= bound * np.linalg.norm(b), (name, error / np.linalg.norm(b), bound)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("nonnegative_bias", [True, False])
def test_it_keeps_its_operands_and_one_number_a_hidden_unit(rng, dtype, nonnegative_bias):
    args = given(make(rng), dtype)
    kept = jax.tree.leaves(jax.vjp(partial(ours, nonnegative_bias=nonnegative_bias), *args)[1])
    hidden = [a for a in kept if a.shape == (*SHAPE[:2], SHAPE[3])]
    assert [a.dtype for a in hidden] == [dtype if nonnegative_bias else "float32"]
    assert sum(a.nbytes for a in kept) == sum(a.nbytes for a in (*args, *hidden))


@pytest.mark.parametrize("name", ["product", "hidden"])
def test_a_remat_policy_keeps_that_number_alone(rng, name):
    args = given(make(rng), "bfloat16")
    policy = jax.checkpoint_policies.save_only_these_names(name)
    kept = jax.tree.leaves(jax.vjp(jax.checkpoint(ours, policy=policy), *args)[1])
    extra = [a for a in kept if a.shape not in {b.shape for b in args}]
    assert [(a.shape, a.dtype) for a in extra] == [((*SHAPE[:2], SHAPE[3]), jnp.bfloat16)]


def test_the_same_as_the_unit_and_the_map(rng):
    x, w, out, bias, alpha, epsilon = given(make(rng), "float32")
    two = yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon) @ out
    np.testing.assert_allclose(ours(x, w, out, bias, alpha, epsilon), two, rtol=1e-5, atol=1e-4)


def test_operands_that_do_not_fit_are_refused(rng):
    x, w, out, bias, alpha, epsilon = given(make(rng), "float32")
    with pytest.raises(ValueError, match="float32, float32 and bfloat16"):
        yat_mlp(x, w, out.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"must be \(..., m, d\), \(d, n\) and \(n, e\)"):
        yat_mlp(x, w, out.T)
    with pytest.raises(ValueError, match=r"alpha is \(20,\)"):
        yat_mlp(x, w, out, alpha=bias)
    with pytest.raises(ValueError, match="epsilon is 0"):
        yat_mlp(x, w, out, epsilon=0)
