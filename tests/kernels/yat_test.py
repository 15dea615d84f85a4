"""The ⵟ-product against the formula in float64 by direct differences, its gradients by complex steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.yat import ill_conditioned, squared_distances, unit, yat
from aether.testing import equations
from tools.accuracy import near_cases

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
    pytest.param(dict(near=0.0), {}, id="equal"),
    pytest.param(dict(near=0.05, negative=True), dict(nonnegative_bias=False), id="near, negative"),
    pytest.param(dict(near=0.01, epsilon=1e-3), dict(distance="exact"), id="exact, near"),
    pytest.param(dict(heads=True, near=0.01), dict(distance="exact", spherical=True), id="exact, spherical heads"),
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


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("nonnegative_bias", [False, True])
def test_the_edges_are_finite(rng, dtype, spherical, nonnegative_bias):
    """x = w (where the expanded distance is clamped), x = 0, w = 0, and n = 0, in one call."""
    args = make(rng, (8, 48, 8), near=0.0, epsilon=1e-3)
    args[0][1], args[1][:, 1] = 0.0, 0.0
    args[1][:, 2:6] = args[0][2:6].T
    args[2][:4] = 0.0  # with x = 0 or w = 0: n = 0; elsewhere y = b²/(2 + ε) at x = 0 if spherical
    given, exact = rounded(args, dtype)
    y, grads = run(given, np.ones((8, 8)), spherical=spherical, nonnegative_bias=nonnegative_bias)
    assert np.isfinite(y).all() and (y >= 0).all()
    assert y[1, 1] == 0 and y[0, 0] > 0
    if spherical and dtype == "float32":  # the direction of 0 is as far from any other as a right angle is
        exact_y, _ = run(given, np.ones((8, 8)), spherical=True, distance="exact")
        np.testing.assert_allclose(exact_y[1], y[1], rtol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)
    if dtype == "float32" and not spherical:
        bound = BOUNDS[dtype] * kappa(exact[0], exact[1], exact[4].min(), False)
        assert np.abs(y - formula(*exact)).max() <= bound * formula(*exact).max()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("distance", ["expanded", "exact"])
def test_nothing_overflows_from_norm_0_to_1e4(rng, dtype, spherical, distance):
    """x = w, x = 2w, x = −w, x ⊥ w, x = 0 and w = 0, with ε from 1e-6 to 1 and b = 0; b of both promises."""

    @jax.jit
    def both(x, w, epsilon):
        out = []
        for promise in (True, False):
            options = dict(spherical=spherical, distance=distance, nonnegative_bias=promise)
            y, back = jax.vjp(
                lambda x, w, b, a, e, options=options: yat(x, w, bias=b, alpha=a, epsilon=e, **options),
                *(x, w, jnp.zeros(6), jnp.ones(1), epsilon),
            )
            out.append((y, back(jnp.ones_like(y))))
        return out

    for norm, epsilon in [(n, e) for n in (0.0, 1e-3, 1.0, 1e2, 1e4) for e in (1e-6, 1.0)]:
        x = norm * rng.normal(size=(6, 48)) / np.sqrt(48)
        w = x * np.array([1.0, 0.0, 2.0, -1.0, 1.0, 1.0])[:, None]
        x[4] = 0.0
        out = both(jnp.asarray(x, dtype), jnp.asarray(w.T, dtype), jnp.full((1,), epsilon))
        assert all(np.isfinite(np.asarray(v, float)).all() for v in jax.tree.leaves(out)), (norm, epsilon)


def test_the_exact_distance_of_near_vectors_is_right_and_the_other_keeps_its_bound():
    """x = w + noise at d = 768, ‖w‖ from 1e-2 to 1e3: at 1e3 and 1e-2 the expansion has lost the distance."""
    rows = list(near_cases())
    assert max(r.exact for r in rows) <= 1e-3
    assert all(r.exact == 0 for r in rows if r.distance == 0)
    assert max(r.exact_share for r in rows) <= 1 and max(r.expanded_share for r in rows) <= 1
    assert max(r.expanded for r in rows) > 1e3  # the rows are hard ones


def test_gradients_by_differences_survive_where_the_expansion_loses_them(rng):
    """At x = w + 1e-4 noise, ‖w‖ = 10, the distance's own gradient 2 g_D (x − w) is what b = −‖w‖² leaves over."""
    w = rng.normal(size=(1, 32))
    w *= 10 / np.linalg.norm(w)
    given, exact = rounded(
        [w + 1e-4 * rng.normal(size=(1, 32)), w.T, np.array([0.0]), np.ones(1), np.array([1e-6])], "float32"
    )
    _, grads = run(given, [[1.0]], distance="exact")
    right = terms(exact, np.ones((1, 1)), False)
    for name, grad, (want, _) in zip(NAMES[:2], grads, right, strict=False):
        assert np.linalg.norm(grad - want) <= 1e-3 * np.linalg.norm(want), name


def test_blocks_of_any_size_and_leading_axes_give_the_distances(rng):
    for d in (1, 15, 16, 33):
        x, w = rng.normal(size=(2, 1, 4, d)), rng.normal(size=(3, 5, d))
        want = ((x[..., :, None, :] - w[..., None, :, :]) ** 2).sum(-1)
        got = squared_distances(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_exact_distance_holds_no_differences_of_all_pairs(rng):
    x, w = jnp.ones((40, 160)), jnp.ones((30, 160))
    kept = jax.make_jaxpr(jax.grad(lambda x, w: squared_distances(x, w).sum(), (0, 1)))(x, w)
    assert max(v.aval.size for e in equations(kept.jaxpr) for v in e.outvars) <= 40 * 30 * 16


def test_ill_conditioned_pairs_are_counted(rng):
    w = rng.normal(size=(8, 3)) / np.sqrt(8)
    x = np.concatenate([w.T + 1e-3, w.T, rng.normal(size=(5, 8))])
    right = (x**2).sum(-1)[:, None] + (w**2).sum(0)
    right = right / (((x[..., None] - w) ** 2).sum(1) + 1e-5)
    for threshold in (1e3, 1e5):
        found = ill_conditioned(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), 1e-5, threshold)
        assert int(found) == (right > threshold).sum()
    assert (right > 1e3).sum() == 6


@pytest.mark.parametrize("nonnegative_bias", [False, True])
@pytest.mark.parametrize("near", [0.0, 0.03])
def test_a_clamped_distance_has_no_derivative(rng, near, nonnegative_bias):
    """Rounded to bfloat16, unit vectors may have x̂·ŵ > 1: then y = n²/ε, and 2n/ε ŵ flows back to x̂, no 2n²/ε² ŵ."""
    x = rng.normal(size=(200, 16))
    w = x + near * rng.normal(size=x.shape)
    x, w = (np.asarray(unit(jnp.asarray(v, jnp.bfloat16)), np.float64) for v in (x, w))
    row = (x * w).sum(-1).argmax()
    n = (x * w).sum(-1)[row] + 0.25
    assert n > 1.25
    given, _ = rounded([x[[row]], w[[row]].T, np.array([0.25]), np.array([1.0]), np.array([0.5])], "bfloat16")
    y, (of_x, of_w, *grads) = run(given, [[1.0]], spherical=True, normalized=True, nonnegative_bias=nonnegative_bias)
    np.testing.assert_allclose(
        [y.item(), *(g.item() for g in grads)], [n**2 / 0.5, 4 * n, n**2 / 0.5, -(n**2) / 0.25], rtol=1e-2
    )
    np.testing.assert_allclose(of_x[0], 2 * n / 0.5 * w[row], rtol=1e-2)  # with the other term: 3.5 times that
    np.testing.assert_allclose(of_w[:, 0], 2 * n / 0.5 * x[row], rtol=1e-2)


@pytest.mark.parametrize("nonnegative_bias", [False, True])
def test_directions_are_scaled_after_their_product(rng, nonnegative_bias):
    """Nothing is rounded between x·w and the distance: near directions have that of their bfloat16 numbers."""
    x = rng.normal(size=(200, 16))
    args = [x, (x + 0.003 * rng.normal(size=x.shape)).T, np.array([0.25]), np.array([1.0]), np.array([1e-5])]
    given, (x, w, *_) = rounded(args, "bfloat16")
    x, w = x / np.linalg.norm(x, axis=-1, keepdims=True), w / np.linalg.norm(w, axis=0)
    distance, got = ((x.T - w) ** 2).sum(0), np.diagonal(run(given, np.ones((200, 200)), spherical=True)[0])
    np.testing.assert_allclose(got, (1 - distance / 2 + 0.25) ** 2 / (distance + 1e-5), rtol=3e-2)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("nonnegative_bias", [False, True])
def test_backward_keeps_one_number_an_output(rng, dtype, nonnegative_bias):
    given, _ = rounded(make(rng, (40, 3, 30)), dtype)

    def f(x, w, bias, alpha, epsilon):
        return yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon, nonnegative_bias=nonnegative_bias)

    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(f, *given)[1]) if leaf.size >= 40 * 30]
    assert len(kept) == 1 and kept[0].shape == (40, 30)
    assert kept[0].dtype == (dtype if nonnegative_bias else "float32")


def test_products_take_bfloat16_and_accumulate_in_float32(rng):
    given, _ = rounded(make(rng, (5, 6, 4), heads=True), "bfloat16")

    def f(x, w, bias, alpha, epsilon):
        return yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon, spherical=True).sum()

    def products(g):
        return [e for e in equations(jax.make_jaxpr(g)(*given).jaxpr) if e.primitive.name == "dot_general"]

    assert [e.outvars[0].aval.dtype for e in products(f)] == ["float32"]
    both = products(jax.grad(f, (0, 1, 2, 3, 4)))
    assert len(both) >= 3  # forward, for x, for w
    assert {v.aval.dtype.name for e in both for v in e.invars} == {"bfloat16"}


def test_the_result_may_have_another_dtype(rng):
    given, _ = rounded(make(rng, (5, 6, 4)), "bfloat16")
    for options, dtype in [({}, "bfloat16"), (dict(dtype=jnp.dtype("float32")), "float32")]:
        assert jax.eval_shape(lambda x, w: yat(x, w, **options), *given[:2]).dtype == dtype  # noqa: B023


def test_leading_axes_broadcast_as_in_matmul(rng):
    x, w = rng.normal(size=(3, 2, 5, 6)), rng.normal(size=(2, 6, 4))
    args = [x, w, np.full((2, 1, 1), 0.2), np.array([1.0]), np.array([0.4])]
    given, exact = rounded(args, "float32")
    cotangent = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
    y, grads = run(given, cotangent)
    np.testing.assert_allclose(y, formula(*exact), rtol=1e-4)
    for grad, lead in zip(grads[:2], (x.shape, w.shape), strict=True):
        assert grad.shape == lead
    want = sum(terms([exact[0][i], *exact[1:]], cotangent[i].astype(float), False)[1][0] for i in range(3))
    np.testing.assert_allclose(grads[1], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_second_derivatives_are_those_of_plain_autodiff(rng):
    given, _ = rounded(make(rng, (3, 4, 2)), "float32")

    def plain(x, w, bias, alpha, epsilon):
        distance = jnp.sum((x[:, :, None] - w[None]) ** 2, 1)
        return alpha * (x @ w + bias) ** 2 / (distance + epsilon)

    def ours(x, w, bias, alpha, epsilon):
        return yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon)

    def curvature(f, args):
        gradient = jax.grad(lambda args: jnp.sum(jnp.sin(f(*args))))
        return jax.grad(lambda args: sum(jnp.sum(g**2) for g in gradient(args)))(args)

    both = jax.jit(lambda args: (curvature(ours, args), curvature(plain, args)))
    for a, b in zip(*both(given), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max()))


def test_exact_third_derivatives_are_finite_and_right_at_the_prototype():
    """At x = w = e₁ with b = 0, ε = 1 along e₁: y = (1 + t)²/(t² + 1), whose derivatives at 0 are 2, 0, −12."""

    def along(t):
        x = jnp.zeros((1, 4)).at[0, 0].set(1.0 + t)
        return yat(x, jnp.eye(4)[:, :1], epsilon=1.0, distance="exact")[0, 0]

    first, second = jax.grad(along), jax.grad(jax.grad(along))
    got = jax.jit(lambda t: (along(t), first(t), second(t), jax.grad(second)(t)))(0.0)
    np.testing.assert_allclose(jax.jit(jax.hessian(along))(0.0), got[2], atol=1e-5)  # forward over reverse mode
    np.testing.assert_allclose(got, [1.0, 2.0, 0.0, -12.0], atol=1e-5)


def test_a_unit_vector_has_length_one_and_zero_stays_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    rows, columns, slopes = jax.jit(lambda x: (unit(x), unit(x.T, 0), jax.jacobian(unit)(x)))(x)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(columns, rows.T)
    assert np.isfinite(slopes).all()


def test_operands_that_do_not_fit_are_refused():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="float32 and w bfloat16"):
        yat(x, jnp.ones((3, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match="vectors of 3 and w of 2"):
        yat(x, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="vectors of 3 and w of 4"):
        yat(x, jnp.ones((2, 4)), transposed=True)
    for wrong in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"epsilon is {wrong}; it must be a positive finite number"):
            yat(x, jnp.ones((3, 2)), epsilon=wrong)
    with pytest.raises(ValueError, match=r"x is \(3,\) and w \(3, 2\)"):
        yat(x[0], jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="distance is 'near'; it must be one of expanded, exact"):
        yat(x, jnp.ones((3, 2)), distance="near")
    with pytest.raises(ValueError, match="x and w are int32; they must be of a floating dtype"):
        yat(jnp.ones((2, 3), int), jnp.ones((3, 2), int))


@pytest.mark.parametrize("spherical", [True, False])
def test_vectors_in_rows_give_what_vectors_in_columns_give(spherical):
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 3, 5, 4), (2, 1, 4, 6), (2, 3, 5, 6)])

    def columns(x, w):
        return yat(x, w, bias=0.3, alpha=1.5, epsilon=0.2, spherical=spherical)

    def rows(x, w):
        return yat(x, w.swapaxes(-1, -2), bias=0.3, alpha=1.5, epsilon=0.2, spherical=spherical, transposed=True)

    @jax.jit
    def both(x, w, g):
        (y, vjp), (y_rows, vjp_rows) = jax.vjp(columns, x, w), jax.vjp(rows, x, w)
        return (y, y_rows), *zip(vjp(g), vjp_rows(g), strict=True)

    (y, y_rows), *grads = both(x, w, g)
    np.testing.assert_allclose(y_rows, y, rtol=1e-5)
    for b, a in grads:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_vectors_that_are_normalized_already_are_not_normalized_again():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(5, 4), (4, 6)])
    ready = jax.jit(lambda x, w: yat(x, w, spherical=True, normalized=True, epsilon=0.2))
    np.testing.assert_allclose(ready(unit(x), unit(w, -2)), yat(x, w, spherical=True, epsilon=0.2), 1e-6, 1e-8)
    assert np.abs(ready(x, w) - ready(unit(x), unit(w, -2))).max() > 0.1


def test_a_wider_result_is_that_of_the_product_alone_also_where_it_is_differentiated(rng):
    """What is kept is rounded to bfloat16; scores in float32 are not."""
    given, _ = rounded(make(rng, (6, 5, 7)), "bfloat16")

    def f(*args):
        x, w, bias, alpha, epsilon = args
        return yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon, dtype=jnp.dtype("float32"))

    y, again = f(*given), jax.vjp(f, *given)[0]
    assert again.dtype == jnp.float32
    np.testing.assert_allclose(again, y, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_zero_row_gives_the_others_no_harm(rng, dtype):
    x, w = jnp.asarray(rng.normal(size=(4, 5)), dtype).at[0].set(0), jnp.asarray(rng.normal(size=(5, 3)), dtype)
    f = lambda x, w: jnp.sum(yat(x, w, bias=1.0, epsilon=0.1, spherical=True).astype(jnp.float32))  # noqa: E731
    of_x, of_w = jax.grad(f, (0, 1))(x, w)
    alone = jax.grad(f, 1)(x[1:], w)
    assert not of_x[0].any() and jnp.isfinite(of_x).all()
    error = jnp.abs((of_w - alone).astype(jnp.float32)).max()
    assert error <= (1e-6 if dtype == "float32" else 1e-2) * jnp.abs(alone).max()


def test_directions_by_differences_take_forward_mode(rng):
    x, w, dx = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(4, 5), (5, 3), (4, 5)])
    f = lambda x: yat(x, w, epsilon=0.1, spherical=True, distance="exact")  # noqa: E731
    _, forward = jax.jvp(f, (x,), (dx,))
    step = 1e-2
    np.testing.assert_allclose(forward, (f(x + step * dx) - f(x - step * dx)) / (2 * step), rtol=2e-2, atol=1e-3)
