"""The theory of the ⵟ-product as properties of the code: examples are drawn, compiled functions are only run.

Tolerances follow from the condition κ = (‖x‖² + ‖w‖²)/(D + ε) of a pair, see `Errors`. Where a quantity is zero or
equal exactly, so is the test.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.kernels.conv import yat_conv, yat_conv_transpose
from aether.kernels.yat import yat
from aether.nn import YatNMN
from tools import reference

ROUNDING = 2.0**-24
ROWS, WIDTH = 12, 8

properties = settings(max_examples=15, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
epsilons = st.floats(1e-3, 1.0)
biases = st.floats(0.0, 3.0)
sizes = st.floats(0.1, 10.0)
either = st.booleans()


class Errors:
    """The float64 value of every pair, and how far float32 may be from it.

    The distance is off by 16 κ roundings of itself plus ε: 8 by the clamp, 8 by sums and rounded operands. The rest of
    the arithmetic takes 8. n = x·w + b is off by 8 roundings of ‖x‖‖w‖ + b, however small it is itself.
    """

    def __init__(self, x, w, b, epsilon, spherical=False):
        x, w = x.astype(np.float64), w.astype(np.float64)
        self.y = reference.yat(x, w, bias=b, epsilon=epsilon, spherical=spherical)
        x, w = (reference.unit(x), reference.unit(w, 0)) if spherical else (x, w)
        self.lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0)
        self.q = np.sum((x[:, :, None] - w) ** 2, 1) + epsilon
        kappa = (np.sum(x * x, 1)[:, None] + np.sum(w * w, 0)) / self.q
        slip = 8 * ROUNDING * (self.lengths + abs(b))
        self.bound = (8 + 16 * kappa) * ROUNDING * self.y + (2 * np.sqrt(self.y * self.q) * slip + slip**2) / self.q


def normal(seed, *shape, size=1.0):
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@cache
def product(**options):
    """Return the compiled (x, w, b, ε) -> y of float32 (m, d), (d, n)."""
    return jax.jit(lambda x, w, b, e: yat(x, w, bias=b, epsilon=e, **options))


@cache
def slope(**options):
    """Return the compiled (x, w, b, ε) -> the gradient of each y[i, 0] by x[i]."""
    return jax.jit(jax.grad(lambda x, w, b, e: yat(x, w, bias=b, epsilon=e, **options)[:, 0].sum()))


def points(seed, size, repeat):
    """Draw ROWS points, the last of them equal to the first if `repeat`: then the Gram matrix is singular."""
    x = normal(seed, ROWS, WIDTH, size=size)
    if repeat:
        x[-1] = x[0]
    return x


@properties
@given(seeds, sizes, biases, epsilons, either, either)
def test_a_gram_matrix_is_symmetric_and_positive_semi_definite(seed, size, b, epsilon, spherical, repeat):
    x = points(seed, size, repeat)
    gram = np.asarray(product(spherical=spherical)(x, x.T, b, epsilon), np.float64)
    error = Errors(x, x.T, b, epsilon, spherical).bound.max()
    assert np.abs(gram - gram.T).max() <= 2 * error
    least = np.linalg.eigvalsh((gram + gram.T) / 2)[0]
    assert least >= -ROWS * error  # a symmetric error E moves an eigenvalue by at most ‖E‖ ≤ ROWS max |E|


def test_a_negative_bias_breaks_positive_semi_definiteness():
    x = np.array([[1.0, 0.0], [2.0, 0.0]], np.float32)
    gram = np.asarray(product()(x, x.T, -1.0, 1.0))  # [[0, ½], [½, 9]]: its determinant is −¼
    np.testing.assert_allclose(gram, [[0.0, 0.5], [0.5, 9.0]], rtol=1e-5)
    assert np.linalg.eigvalsh(gram)[0] < -0.02


@properties
@given(seeds, sizes, biases, epsilons)
def test_far_away_it_is_the_square_of_the_cosine(seed, size, b, epsilon):
    """y → ‖w‖² cos² θ as r = ‖x‖ → ∞: with c = ‖w‖ cos θ, y − c² = (2rc(b + c²) + b² − c²(‖w‖² + ε))/(D + ε)."""
    w, direction = normal(seed, WIDTH, 4, size=size), reference.unit(normal(seed + 1, ROWS, WIDTH))
    length = np.linalg.norm(w, axis=0)
    for far in (1e3, 1e5):
        x = (far * direction).astype(np.float32)
        errors = Errors(x, w, b, epsilon)
        left_out = 2 * far * length * (b + length**2) + b**2 + length**2 * (length**2 + epsilon)
        y = np.asarray(product()(x, w, b, epsilon), np.float64)
        assert (np.abs(y - (direction @ w) ** 2) <= left_out / (far - length) ** 2 + 2 * errors.bound).all()


@properties
@given(seeds, sizes, biases, epsilons, st.floats(2.0, 100.0))
def test_the_gradient_decays_as_one_over_the_distance(seed, size, b, epsilon, times):
    """‖x‖·‖∇y‖ stays bounded: with r = ‖x − w‖ ≥ ‖x‖/2, ‖∇y‖ ≤ 2 n ‖w‖/r² + 2 n²/r³ and n ≤ ‖x‖‖w‖ + b."""
    w, direction = normal(seed, WIDTH, 1, size=size), reference.unit(normal(seed + 1, ROWS, WIDTH))
    length = np.linalg.norm(w)
    far = np.float32(times * (length + b + 1))
    gradients = np.asarray(slope()((far * direction).astype(np.float32), w, b, epsilon), np.float64)
    n, r = far * length + b, far - length
    assert (np.linalg.norm(gradients, axis=1) <= 1.001 * (2 * n * length / r**2 + 2 * n**2 / r**3)).all()


@properties
@given(seeds, sizes, epsilons, either, st.integers(1, WIDTH - 1))
def test_disjoint_supports_give_exactly_zero(seed, size, epsilon, spherical, cut):
    x, w = normal(seed, ROWS, WIDTH, size=size), normal(seed + 1, WIDTH, 4)
    x[:, cut:] = 0
    w[:cut] = 0
    assert (product(spherical=spherical)(x, w, 0.0, epsilon) == 0).all()
    assert (slope(spherical=spherical)(x, w, 0.0, epsilon) == 0).all()
    assert (product(spherical=spherical)(x, w, 0.5, epsilon) > 0).all()


@properties
@given(sizes, epsilons, either)
def test_one_unit_separates_xor(size, epsilon, spherical):
    """w = (1, −1) is orthogonal to (0, 0) and (1, 1), and not to (0, 1) and (1, 0)."""
    x = np.array([[0, 0], [1, 1], [0, 1], [1, 0]], np.float32)
    y = np.asarray(product(spherical=spherical)(x, size * np.array([[1], [-1]], np.float32), 0.0, epsilon))[:, 0]
    assert (y[:2] <= spherical * (2 * ROUNDING) ** 2 / epsilon).all()  # the product of rounded unit vectors is not 0
    assert (y[2:] > 0.1).all() if spherical else (y[2:] > 0).all()


@pytest.mark.parametrize("width", [128, 512, 2048])
def test_with_b_and_alpha_by_width_independent_directions_give_responses_of_one_size(width):
    """u is nearly z/√d with z ~ N(0, 1), so that with b = c/√d and α = d, y is nearly (z + c)²/(2 + ε).

    Its mean is (1 + c²)/(2 + ε), its standard deviation √(2 + 4c²)/(2 + ε), up to a share of order 1/√d.
    """
    c, epsilon = 1.13, 0.3
    x, w = normal(0, 512, width), normal(1, width, 256)
    y = width * np.asarray(product(spherical=True)(x, w, np.float32(c / width**0.5), epsilon), np.float64)
    share = 1.5 / width**0.5
    np.testing.assert_allclose(y.mean(), (1 + c**2) / (2 + epsilon), rtol=share)
    np.testing.assert_allclose(y.std(), (2 + 4 * c**2) ** 0.5 / (2 + epsilon), rtol=2 * share)


@cache
def third():
    """Return the compiled (x, w, v, b, ε) -> the first three derivatives of t -> y(x + t v, w)."""

    def along(x, w, v, b, e):
        f = lambda t: yat((x + t * v)[None], w[:, None], bias=b, epsilon=e, distance="exact")[0, 0]  # noqa: E731
        return tuple(d(0.0) for d in (jax.grad(f), jax.grad(jax.grad(f)), jax.grad(jax.grad(jax.grad(f)))))

    return jax.jit(along)


def derivatives(x, w, v, b, epsilon):
    """The first three derivatives at t = 0 of (n0 + n1 t)²/(d0 + d1 t + d2 t²), by the series of the quotient."""
    x, w, v = (a.astype(np.float64) for a in (x, w, v))
    n0, n1 = x @ w + b, v @ w
    top = np.array([n0**2, 2 * n0 * n1, n1**2, 0.0])
    bottom = np.array([(x - w) @ (x - w) + epsilon, 2 * (x - w) @ v, v @ v, 0.0])
    series = np.zeros(4)
    for k in range(4):
        series[k] = (top[k] - series[:k] @ bottom[k:0:-1]) / bottom[0]
    return series[1:] * [1, 2, 6]


@properties
@given(seeds, biases, st.floats(0.05, 1.0), either)
def test_three_derivatives_exist_and_are_right_at_the_prototype_too(seed, b, epsilon, at_prototype):
    x, w, v = normal(seed, 3, WIDTH)
    x = w.copy() if at_prototype else x
    got = np.asarray(third()(x, w, v, b, epsilon), np.float64)
    want = derivatives(x, w, v, b, epsilon)
    size = (np.abs(x @ w) + b + np.abs(v @ w)) ** 2 / (np.sum((x - w) ** 2) + epsilon)
    steepness = 1 + np.linalg.norm(v) / np.sqrt(np.sum((x - w) ** 2) + epsilon)  # each derivative by t multiplies by it
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= 64 * ROUNDING * size * np.array([1, 2, 6]) * steepness ** np.array([1, 2, 3])).all()


@properties
@given(seeds, sizes, biases, epsilons, either)
def test_a_rotation_of_everything_changes_nothing(seed, size, b, epsilon, spherical):
    x, w = normal(seed, ROWS, WIDTH, size=size).astype(np.float64), normal(seed + 1, WIDTH, 4).astype(np.float64)
    turn, _ = np.linalg.qr(normal(seed + 2, WIDTH, WIDTH).astype(np.float64))
    y, turned = (product(spherical=spherical)(*a, b, epsilon) for a in ((x, w), (x @ turn, turn.T @ w)))
    y, turned = np.asarray(y, np.float64), np.asarray(turned, np.float64)
    assert (np.abs(y - turned) <= 2 * Errors(x, w, b, epsilon, spherical).bound).all()


@properties
@given(seeds, st.integers(-8, 8), biases, epsilons)
def test_a_spherical_unit_does_not_see_lengths(seed, power, b, epsilon):
    x, w = normal(seed, ROWS, WIDTH), normal(seed + 1, WIDTH, 4)
    run = product(spherical=True)
    y, scaled = run(x, w, b, epsilon), run(x * np.float32(2.0**power), w / np.float32(2.0**power), b, epsilon)
    np.testing.assert_array_equal(y, scaled)  # powers of two leave no rounding


@properties
@given(seeds, sizes, biases, epsilons, either, either)
def test_it_is_bounded_and_never_negative(seed, size, b, epsilon, spherical, near):
    """0 ≤ y ≤ α (‖x‖‖w‖ + b)²/ε, even at a prototype."""
    x, w = normal(seed, ROWS, WIDTH, size=size), normal(seed + 1, WIDTH, 4)
    if near:
        x[:4] = w.T
    y = np.asarray(product(spherical=spherical, alpha=1.5)(x, w, b, epsilon))
    lengths = np.ones((ROWS, 4)) if spherical else np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0)
    assert (y >= 0).all() and (y <= 1.5 * (lengths + b) ** 2 / epsilon * (1 + 32 * ROUNDING)).all()


@cache
def layer():
    """Return the graph and state of a YatNMN with a softplus bias for each of four units."""
    return nnx.split(YatNMN(WIDTH, 4, softplus_bias=True, bias_init=0.5, epsilon=0.1, rngs=nnx.Rngs(0)))


@cache
def layer_run():
    return jax.jit(lambda state, x: nnx.merge(layer()[0], state)(x))


@properties
@given(seeds, st.permutations(range(4)))
def test_units_are_independent_of_one_another(seed, order):
    graph, state = layer()
    x, order = normal(seed, ROWS, WIDTH), np.asarray(order)
    moved = jax.tree.map(lambda v: v[..., order] if v.shape[-1] == 4 else v, state)
    np.testing.assert_array_equal(layer_run()(moved, x), layer_run()(state, x)[:, order])


@cache
def convolution():
    """Return the compiled (x, kernel, b, ε) -> (ⵟ convolution with stride 2, ⵟ-product with the same patches)."""

    def both(x, kernel, b, e):
        patches = jnp.stack([x[i : i + 3].ravel() for i in range(0, len(x) - 2, 2)])
        dense = yat(patches, kernel.reshape(-1, kernel.shape[-1]), bias=b, epsilon=e)
        return yat_conv(x[None], kernel, strides=2, padding="VALID", bias=b, epsilon=e)[0], dense

    return jax.jit(both)


@properties
@given(seeds, sizes, biases, epsilons)
def test_a_convolution_is_the_dense_unit_on_patches(seed, size, b, epsilon):
    x, kernel = normal(seed, 9, 2, size=size), normal(seed + 1, 3, 2, 4)
    ours, dense = (np.asarray(y, np.float64) for y in convolution()(x, kernel, b, epsilon))
    patches = np.stack([x[i : i + 3].ravel() for i in range(0, 7, 2)])
    errors = Errors(patches, kernel.reshape(6, 4), b, epsilon)
    assert (np.abs(ours - errors.y) <= errors.bound).all() and (np.abs(dense - errors.y) <= errors.bound).all()


def dot_of(f, x, w, b, **options):
    """The p·w of a ⵟ layer: y(b)/y(−b) = ((p·w + b)/(p·w − b))², whatever the distance, for b > |p·w|."""
    high, low = (f(x, w, bias=c, epsilon=1.0, nonnegative_bias=False, **options) for c in (b, -b))
    r = jnp.sqrt(high / low)
    return b * (r - 1) / (r + 1)


@cache
def adjoint():
    """Return the compiled (x, kernel, z, b) -> (p·w of the convolution of x, p·w of the transposed one of z)."""
    options = dict(strides=2, padding="VALID")

    def both(x, kernel, z, b):
        return (
            dot_of(yat_conv, x, kernel, b, **options),
            dot_of(yat_conv_transpose, z, kernel, b, transpose_kernel=True, **options),
        )

    return jax.jit(both)


@properties
@given(seeds, sizes)
def test_the_transposed_convolution_is_the_adjoint(seed, size):
    """⟨conv x, z⟩ = ⟨x, convᵀ z⟩ of the dot products inside the units."""
    x, kernel, z = normal(seed, 1, 9, 2, size=size), normal(seed + 1, 3, 2, 4), normal(seed + 2, 1, 4, 4)
    b = np.float32(1 + np.abs(kernel).sum() * max(np.abs(x).max(), np.abs(z).max()))
    forward, back = (np.asarray(y, np.float64) for y in adjoint()(x, kernel, z, b))
    assert back.shape == x.shape and forward.shape == z.shape
    slip = 16 * ROUNDING * b * (np.abs(x).sum() + np.abs(z).sum())
    assert abs(np.sum(forward * z) - np.sum(x * back)) <= slip < 0.1 * np.linalg.norm(forward) * np.linalg.norm(z)
