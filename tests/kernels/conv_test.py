"""ⵟ convolutions against the float64 reference, whose gradients are complex steps, and at the edges of their range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var

from aether.kernels.conv import yat_conv, yat_conv_transpose
from aether.kernels.tail import FLOOR
from aether.kernels.window import conv_window
from aether.kernels.yat import yat
from aether.testing import equations
from tools import reference

BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}  # times kappa, the condition of the distance
NAMES = ("x", "w", "bias", "alpha", "epsilon")

CONVS = [
    # x, w, options
    ((2, 6, 2), (3, 2, 3), {}),
    ((1, 6, 2), (3, 2, 3), dict(padding="CAUSAL", spherical=True)),
    ((1, 7, 4), (3, 2, 4), dict(padding="REFLECT", feature_group_count=2, strides=2)),
    ((1, 7, 4), (3, 1, 4), dict(padding="CIRCULAR", feature_group_count=4, spherical=True, kernel_dilation=2)),
    ((1, 4, 5, 2), (2, 3, 2, 3), dict(strides=(1, 2), nonnegative_bias=False)),
    ((1, 3, 3, 2), (2, 2, 1, 4), dict(padding=1, input_dilation=2, feature_group_count=2, distance="exact")),
    ((1, 4, 3, 2), (2, 2, 2, 2), dict(padding="CIRCULAR", spherical=True, nonnegative_bias=False)),
    ((1, 4, 4, 1), (2, 2, 1, 3), dict(padding=1, strides=2, distance="exact", spherical=True)),
    ((1, 3, 2, 3, 1), (2, 2, 2, 1, 2), dict(padding="VALID")),
]
TRANSPOSED = [
    ((2, 3, 2), (3, 2, 3), dict(strides=2)),
    ((1, 3, 2), (3, 3, 2), dict(strides=2, padding="CIRCULAR", transpose_kernel=True)),
    ((1, 3, 2), (2, 2, 3), dict(strides=3, padding="VALID", spherical=True, kernel_dilation=2)),
    ((1, 2, 3, 2), (2, 3, 2, 2), dict(strides=(2, 1), padding=[(2, 1), 1], distance="exact")),
    ((1, 2, 2, 1, 2), (2, 2, 1, 2, 2), dict(strides=2, nonnegative_bias=False)),
]
CASES = [(yat_conv, reference.yat_conv, *c) for c in CONVS]
CASES += [(yat_conv_transpose, reference.yat_conv_transpose, *c) for c in TRANSPOSED]


def draw(rng, x, w, options):
    outputs = w[-2] if options.get("transpose_kernel") else w[-1]
    low = -1.5 if options.get("nonnegative_bias") is False else 0.0
    bias, one = rng.uniform(low, 0.5, outputs), rng.uniform(1.0, 2.0, (1,))
    return [rng.normal(size=x), rng.normal(size=w), bias, one, 0.3 * rng.uniform(0.9, 1.1, (1,))]


def of_formula(options):
    """The options that change the value."""
    return {k: v for k, v in options.items() if k not in ("nonnegative_bias", "distance")}


def condition(f, x, w, epsilon, options):
    """max (‖p‖² + ‖w‖²) / (D + ε), at least 1, from the reference's values at two large biases."""
    high, low = (np.sqrt(f(x, w, bias=b, epsilon=epsilon, **options)) for b in (1e6, -1e6))
    q = (2e6 / (high + low)) ** 2  # (n + b)²/q of b and of −b
    dot = (high - low) / 2 * np.sqrt(q)
    return max(1.0, float(np.max((q - epsilon + 2 * dot) / q)))


def test_the_condition_is_that_of_the_reference(rng):
    x, w = rng.normal(size=(1, 3, 1)), rng.normal(size=(3, 1, 4))
    found = condition(reference.yat_conv, x, w, 0.1, dict(padding="VALID"))
    assert found == pytest.approx(reference.kappa(x[..., 0], w[:, 0], 0.1), rel=1e-6)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_values_and_gradients_are_those_of_the_formula(rng, dtype):
    cases = CASES if dtype == "float32" else CASES[1::2]
    inputs = [draw(rng, x, w, options) for _, _, x, w, options in cases]
    given = [[jnp.asarray(a, dtype if i < 2 else jnp.float32) for i, a in enumerate(args)] for args in inputs]
    exact = [[np.asarray(a, np.float64) for a in args] for args in given]
    wants, cotangents = [], []
    for (_, f, _, _, options), args in zip(cases, exact, strict=True):
        options = of_formula(options)
        g = lambda x, w, b, a, e, f=f, o=options: f(x, w, bias=b, alpha=a, epsilon=e, **o)  # noqa: E731
        y = g(*args)
        cotangents.append(jnp.asarray(rng.normal(size=y.shape), dtype))
        wants.append((y, reference.gradient(g, args, np.asarray(cotangents[-1], np.float64))))

    def all_cases(given, cotangents):
        results = []
        for (f, _, _, _, options), args, g in zip(cases, given, cotangents, strict=True):
            apply = lambda x, w, b, a, e, f=f, o=options: f(x, w, bias=b, alpha=a, epsilon=e, **o)  # noqa: E731
            y, back = jax.vjp(apply, *args)
            results.append((y, back(g)))
        return results

    found = jax.jit(all_cases)(given, cotangents)
    for (_, f, *_, options), args, (y, grads), (want, gradients) in zip(cases, exact, found, wants, strict=True):
        bound = BOUNDS[dtype] * condition(f, *args[:2], args[4], of_formula(options))
        case = f"{f.__name__} {options}"
        assert y.dtype == dtype and y.shape == want.shape, case
        assert np.linalg.norm(np.asarray(y, np.float64) - want) <= bound * np.linalg.norm(want), case
        for name, grad, (right, size) in zip(NAMES, grads, gradients, strict=True):
            error = np.asarray(grad, np.float64) - right
            if size.size == 1:  # its terms may cancel
                assert (np.abs(error) <= bound * size).all(), (case, name)
            else:
                assert np.linalg.norm(error) <= bound * np.linalg.norm(right), (case, name)


@pytest.mark.parametrize("distance", ["expanded", "exact"])
def test_a_convolution_is_the_product_with_its_patches(rng, distance):
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 6, 5, 3), (3, 2, 3, 4)])
    unit = dict(bias=jnp.arange(4.0), alpha=1.5, epsilon=0.2, distance=distance)

    def both(x, w):
        wide, window = conv_window(x, (3, 2), strides=2)
        patches = window.patches(wide)
        ours = yat_conv(x, w, strides=2, **unit), yat_conv(x, w, strides=2, spherical=True, **unit)
        rows, columns = patches.reshape(2, -1, 3 * 2 * 3), w.reshape(-1, 4)
        dense = yat(rows, columns, **unit), yat(rows, columns, spherical=True, **unit)
        return ours, dense

    for ours, dense in zip(*jax.jit(both)(x, w), strict=True):
        np.testing.assert_allclose(ours, dense.reshape(ours.shape), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [1e-2, 1.0, 1e3])
def test_the_exact_distance_resolves_patches_near_their_kernel(rng, norm):
    direction = rng.normal(size=(5, 7, 32))
    w = (norm * direction / np.linalg.norm(direction)).astype(np.float32)[..., None]
    noise = [0.0, 1e-4, 1e-2]
    x = np.stack([w[..., 0] + n * rng.normal(size=w.shape[:-1]) for n in noise]).astype(np.float32)
    epsilon = 1e-6
    y = np.asarray(yat_conv(x, w, padding="VALID", epsilon=epsilon, distance="exact"), np.float64).ravel()
    near = reference.yat_conv(x, w, padding="VALID", epsilon=epsilon).ravel()
    np.testing.assert_allclose(y, near, rtol=1e-3)


def unit_cases():
    for distance in ("expanded", "exact"):
        for spherical in (False, True):
            for nonnegative_bias in (False, True):
                yield dict(distance=distance, spherical=spherical, nonnegative_bias=nonnegative_bias)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_edges_are_finite(rng, dtype):
    """x = w, x = 0, w = 0, norms of 1e4 with ε = 1e-6; where a direction is missing, D = 2 and no gradient."""
    x = rng.normal(size=(4, 6, 2))
    w = np.stack([np.zeros((3, 2)), x[0, :3], rng.normal(size=(3, 2))], -1)
    x[1] = 0.0
    x[2] *= 1e4 / np.linalg.norm(x[2, :3])
    x[3] *= 1e-8
    w = np.concatenate([w, x[2, :3, :, None]], -1)
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    bias = jnp.asarray([0.0, 0.25, 0.0, 0.25])

    def run(x, w, bias, options):
        def f(x, w, b, e):
            return yat_conv(x, w, bias=b, epsilon=e, padding="VALID", dtype=jnp.dtype("float32"), **options)

        y, back = jax.vjp(f, x, w, bias, jnp.full((1,), 1e-6))
        return y, back(jnp.ones_like(y))

    found = jax.jit(lambda *a: [run(*a, options) for options in unit_cases()])(x, w, bias)
    for options, (y, grads) in zip(unit_cases(), found, strict=True):
        assert np.isfinite(y).all() and (y >= 0).all(), options
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads), options
        if options["spherical"]:
            np.testing.assert_allclose(y[1], np.broadcast_to(np.asarray(bias) ** 2 / 2, y[1].shape), rtol=1e-4)
            assert (np.asarray(grads[0][1]) == 0).all() and (np.asarray(grads[1][..., 0]) == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("nonnegative_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_backward_keeps_its_operands_and_one_number_an_output(dtype, spherical, nonnegative_bias, groups):
    x, w, b = jnp.ones((2, 30, 2), dtype), jnp.ones((3, 2 // groups, 40), dtype), jnp.ones(40)

    def f(x, w, bias):
        options = dict(feature_group_count=groups, nonnegative_bias=nonnegative_bias)
        return yat_conv(x, w, bias=bias, spherical=spherical, **options)

    def residuals(x, w, bias):
        return jax.tree.leaves(jax.vjp(f, x, w, bias)[1])

    program = jax.make_jaxpr(residuals)(x, w, b).jaxpr
    kept = {v: v.aval for v in program.outvars if isinstance(v, Var)}
    assert all(v in kept for v in program.invars)
    (number,) = [v for v in kept.values() if v.size == 2 * 30 * 40]
    assert number.dtype == (dtype if nonnegative_bias else "float32")
    given = x.nbytes + w.nbytes + b.nbytes
    rest = sum(v.size * v.dtype.itemsize for v in kept.values()) - given - number.size * number.dtype.itemsize
    assert 0 <= rest <= 2 * 4  # α and ε


@pytest.mark.parametrize("nonnegative_bias", [False, True])
@pytest.mark.parametrize("spherical", [False, True])
def test_gradients_beside_padding_and_at_zero_patches_are_those_of_the_formula(rng, spherical, nonnegative_bias):
    """One image is zero and one has a single pixel, so that most patches have zeros alone."""
    x, w = rng.normal(size=(3, 4, 4, 2)), rng.normal(size=(3, 3, 2, 3))
    x[0], x[1, 1:] = 0.0, 0.0
    x[1, 0, 1:] = 0.0
    low = 0.0 if nonnegative_bias else -1.5
    args = [x, w, rng.uniform(low, low + 0.5, 3), rng.uniform(1.0, 2.0, (1,)), np.full((1,), 0.3)]
    given = [jnp.asarray(a, jnp.float32) for a in args]
    exact = [np.asarray(a, np.float64) for a in given]
    options = dict(spherical=spherical)

    def right(x, w, b, a, e):
        return reference.yat_conv(x, w, bias=b, alpha=a, epsilon=e, **options)

    def ours(x, w, b, a, e):
        return yat_conv(x, w, bias=b, alpha=a, epsilon=e, nonnegative_bias=nonnegative_bias, **options)

    g = rng.normal(size=(3, 4, 4, 3)).astype(np.float32)
    grads = jax.jit(lambda args, g: jax.vjp(ours, *args)[1](g))(given, g)
    for name, grad, (want, size) in zip(NAMES, grads, reference.gradient(right, exact, g.astype(float)), strict=True):
        if name == "x" and spherical:  # the direction of a zero patch has no derivative, its neighbours' have
            assert (np.asarray(grad[0]) == 0).all() and (want[0] == 0).all()
        assert (np.abs(np.asarray(grad, np.float64) - want) <= 1e-5 * np.maximum(size, size.mean())).all(), name


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("nonnegative_bias", [False, True])
def test_where_the_distance_is_clamped_it_has_no_gradient(rng, spherical, nonnegative_bias):
    """p = 1.0003 w, or a direction that near w's, with a tiny ε: Q = floor·S + ε there, and only n = p·w + b varies."""
    w = rng.normal(size=(5, 3, 1))
    x = (w[None, ..., 0] + 3e-4 * (rng.normal(size=w.shape[:-1]) if spherical else w[..., 0])).astype(np.float32)
    w, bias, alpha, epsilon = w.astype(np.float32), 0.25, 1.5, 1e-7

    def f(x, w, b, e):
        options = dict(padding="VALID", spherical=spherical, nonnegative_bias=nonnegative_bias)
        return jnp.sum(yat_conv(x, w, bias=b, alpha=alpha, epsilon=e, **options))

    of_x, of_w, of_b, of_e = jax.jit(jax.grad(f, (0, 1, 2, 3)))(x, w, jnp.float32(bias), jnp.float32(epsilon))
    p, k = x.astype(np.float64).ravel(), w.astype(np.float64).ravel()
    lengths = np.linalg.norm(p), np.linalg.norm(k)
    if spherical:
        p, k = p / lengths[0], k / lengths[1]
    n, s = p @ k + bias, p @ p + k @ k
    q = FLOOR * s + epsilon
    assert np.sum((p - k) ** 2) < 0.5 * FLOOR * s
    of_n = 2 * alpha * n / q
    if spherical:
        want_x, want_w = (of_n * (k - p @ k * p) / lengths[0], of_n * (p - p @ k * k) / lengths[1])
    else:
        want_x, want_w = of_n * k, of_n * p
    slack = 3e-6 * of_n * max(lengths) ** (-1 if spherical else 1)  # of terms that cancel, along the vectors
    np.testing.assert_allclose(np.ravel(of_x), want_x, rtol=1e-5, atol=slack)
    np.testing.assert_allclose(np.ravel(of_w), want_w, rtol=1e-5, atol=slack)
    np.testing.assert_allclose(of_b, of_n, rtol=1e-5)
    np.testing.assert_allclose(of_e, -alpha * (n / q) ** 2, rtol=1e-5)


def test_the_exact_distance_needs_little_memory():
    x, w = jnp.ones((1, 16, 16, 16)), jnp.ones((5, 5, 16, 64))

    def f(x, w):
        return yat_conv(x, w, distance="exact").sum()

    memory = jax.jit(jax.grad(f, (0, 1))).lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 40 * 16 * 16 * 64 * 4  # the differences themselves are 400 times the output


def test_convolutions_take_bfloat16_and_accumulate_in_float32():
    x, w = jnp.ones((2, 6, 2), jnp.bfloat16), jnp.ones((3, 2, 4), jnp.bfloat16)

    def convolutions(f):
        program = jax.make_jaxpr(f)(x, w).jaxpr
        return [e for e in equations(program) if e.primitive.name == "conv_general_dilated"]

    for spherical in (False, True):
        f = lambda x, w: yat_conv(x, w, spherical=spherical).astype(jnp.float32).sum()  # noqa: B023, E731
        assert [e.outvars[0].aval.dtype for e in convolutions(f)] == ["float32"]
        both = convolutions(jax.grad(f, (0, 1)))
        assert len(both) == 3  # forward, for x, for w
        assert {v.aval.dtype.name for e in both for v in e.invars} == {"bfloat16"}


@pytest.mark.parametrize("spherical", [False, True])
def test_second_derivatives_are_those_of_plain_autodiff(rng, spherical):
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 2), (2, 2, 3)])

    def plain(x, w):
        p, w = jnp.stack([x[:2], x[1:]], 1).reshape(2, 4), w.reshape(4, 3)  # the two patches
        if spherical:
            p, w = p / jnp.linalg.norm(p, axis=-1, keepdims=True), w / jnp.linalg.norm(w, axis=0)
        return (p @ w + 0.3) ** 2 / (jnp.sum((p[..., None] - w) ** 2, -2) + 0.5)

    def ours(x, w):
        return yat_conv(x[None], w, bias=0.3, epsilon=0.5, spherical=spherical, padding="VALID")[0]

    def curvature(f, args):
        gradient = jax.grad(lambda args: jnp.sum(jnp.sin(f(*args))))
        return jax.grad(lambda args: sum(jnp.sum(g**2) for g in gradient(args)))(args)

    both = jax.jit(lambda args: (curvature(ours, args), curvature(plain, args)))
    for a, b in zip(*both((x, w)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max()))


X, W = jnp.ones((2, 5, 4)), jnp.ones((3, 4, 6))
BAD = [
    (yat_conv, (X, W.astype(jnp.bfloat16)), {}, "float32 and w bfloat16"),
    (yat_conv, (X.astype(int), W.astype(int)), {}, "floating dtype"),
    (yat_conv, (X[0], W), {}, r"x is \(5, 4\) and w \(3, 4, 6\)"),
    (yat_conv, (X[0], W[0]), {}, r"x is \(5, 4\) and w \(4, 6\)"),
    (yat_conv, (X, W), dict(feature_group_count=2), "x has 4 features"),
    (yat_conv, (X, W[:, :1, :5]), dict(feature_group_count=4), "feature_group_count 4"),
    (yat_conv, (X, W), dict(distance="near"), "'near'; it must be one of expanded, exact"),
    (yat_conv_transpose, (X, W), dict(transpose_kernel=True), "x has 4 features"),
    (yat_conv, (X, W), dict(bias=jnp.ones(5)), r"is \(5,\); it must be a number, \(1,\) or \(6,\)"),
]


@pytest.mark.parametrize(("f", "args", "options", "message"), BAD)
def test_operands_that_do_not_fit_are_refused(f, args, options, message):
    with pytest.raises(ValueError, match=message):
        f(*args, **options)
