import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tools import reference as ref

# 1/ε → 0 turns the unit into ε · y ≈ (x·w + b)²: the dot products alone, which flax's linear layers also compute.
LINEAR = 1e12


def linear_part(y):
    return np.sqrt(LINEAR * y)


def close(actual, expected, tol=1e-9):
    assert np.shape(actual) == np.shape(expected)
    assert np.max(np.abs(actual - expected), initial=0) <= tol * max(1.0, np.max(np.abs(expected), initial=0))


def test_yat_on_numbers_that_can_be_checked_by_hand():
    x, w = [[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [1.0, 2.0]]
    close(ref.yat(x, w, epsilon=0.5), np.array([[25 / 5.5, 25 / 0.5], [0.0, 0.0]]))
    close(ref.yat(x, w, bias=[1.0, -1.0], alpha=2.0, epsilon=0.5), np.array([[72 / 5.5, 64.0], [2 / 10.5, 2 / 5.5]]))
    s = 1 / np.sqrt(2)
    close(ref.yat([[1.0, 0.0]], [[5.0], [5.0]], epsilon=1.0, spherical=True), np.array([[s**2 / (3 - 2 * s)]]))
    close(ref.yat([[0.0, 0.0]], [[5.0], [5.0]], bias=1.0, epsilon=1.0, spherical=True), np.array([[1 / 3]]))
    close(ref.yat([[3.0, 0.0]], [[5.0], [5.0]], epsilon=1.0, weight_normalized=True), np.array([[4.5 / (11 - 6 * s)]]))


def test_kappa_is_the_worst_pair():
    assert ref.kappa([[1.0, 2.0]], [[3.0, 1.0], [1.0, 2.0]], 0.5) == pytest.approx(10 / 0.5)
    assert ref.kappa([[0.0, 0.0]], [[0.1], [0.0]], 1.0) == 1.0
    assert ref.kappa([[2.0, 0.0]], [[9.0], [0.0]], 0.1, spherical=True) == pytest.approx(20)


CONVS = [
    ((7,), (3,), dict(padding="SAME", strides=2)),
    ((7,), (3,), dict(padding="CAUSAL", kernel_dilation=2)),
    ((7,), (4,), dict(padding="CIRCULAR")),
    ((6,), (3,), dict(padding="REFLECT", strides=2)),
    ((6,), (3,), dict(padding=2, input_dilation=2)),
    ((6, 5), (3, 2), dict(padding="VALID", feature_group_count=2)),
    ((6, 5), (3, 2), dict(padding=[(2, 1), (0, 3)], kernel_dilation=(1, 2))),
    ((6, 5), (2, 3), dict(padding=1, strides=(1, 2), input_dilation=(2, 1))),
    ((3, 4, 3), (2, 3, 2), dict(padding="CIRCULAR", kernel_dilation=(1, 1, 2))),
    ((3, 4, 3), (2, 3, 2), dict(padding="SAME", strides=(2, 1, 1))),
]
TRANSPOSED = [
    ((4,), (3,), dict(padding="SAME", strides=2)),
    ((4,), (2,), dict(padding="VALID", strides=3)),
    ((4,), (4,), dict(padding="VALID", strides=2, kernel_dilation=2)),
    ((4,), (5,), dict(padding="CIRCULAR", strides=2)),
    ((4,), (4,), dict(padding="CIRCULAR", strides=1, transpose_kernel=True)),
    ((3, 4), (4, 2), dict(padding="CIRCULAR", strides=(2, 3), kernel_dilation=(1, 2))),
    ((3, 4), (2, 3), dict(padding="SAME", strides=(3, 1), transpose_kernel=True)),
    ((3, 4), (2, 3), dict(padding=[(2, 1), (0, 3)], strides=(2, 1))),
    ((2, 2, 3), (2, 3, 2), dict(padding="SAME", strides=2)),
]


def flat_options(options, n):
    return {k: (v,) * n if isinstance(v, int) and k in ("strides",) else v for k, v in options.items()}


@pytest.mark.parametrize("layer, cases", [("Conv", CONVS), ("ConvTranspose", TRANSPOSED)])
def test_patches_and_padding_are_those_of_flax(rng, layer, cases):
    """Where ε is huge only the dot products are left: they are the linear layer's, whatever the options."""
    run = ref.yat_conv if layer == "Conv" else ref.yat_conv_transpose
    inputs, ours = [], []
    for space, window, options in cases:
        channels = (6, 4) if options.get("transpose_kernel") else (4 // options.get("feature_group_count", 1), 6)
        x, w = rng.uniform(0.5, 1.5, (2, *space, 4)), rng.uniform(0.5, 1.5, (*window, *channels))
        inputs.append((x, w))
        ours.append(linear_part(run(x, w, epsilon=LINEAR, **options)))

    @jax.jit
    def theirs(inputs):
        outputs = []
        for (x, w), (_, window, options) in zip(inputs, cases, strict=True):
            options = flat_options(options, len(window))
            linear = getattr(nnx, layer)(4, 6, window, use_bias=False, rngs=nnx.Rngs(0), **options)
            linear.kernel[...] = w
            outputs.append(linear(x))
        return outputs

    for mine, expected in zip(ours, theirs(inputs), strict=True):
        close(mine, np.asarray(expected, np.float64), 2e-6)


def test_conv_is_dense_on_patches(rng):
    x, w = rng.normal(size=(2, 5, 4)), rng.normal(size=(3, 2, 6))
    options = dict(bias=rng.normal(size=6), alpha=1.5, epsilon=0.1)
    whole = ref.yat_conv(x, w, padding="VALID", feature_group_count=2, **options)
    patch = x[:, 1:4, 2:].reshape(2, 6)
    options["bias"] = options["bias"][3:]
    close(whole[:, 1, 3:], ref.yat(patch, w[..., 3:].reshape(6, 3), **options))
    padded = ref.yat_conv(x, w, padding="SAME", feature_group_count=2, epsilon=0.1)
    patch = np.concatenate([np.zeros((2, 1, 2)), x[:, :2, :2]], 1).reshape(2, 6)
    close(padded[:, 0, :3], ref.yat(patch, w[..., :3].reshape(6, 3), epsilon=0.1))


def test_rotation_turns_interleaved_pairs_and_keeps_relative_products(rng):
    x = rng.normal(size=(1, 3, 1, 4))
    angle = 2 * 100.0 ** (-2 / 4)
    expected = x[0, 2, 0, 2] * np.cos(angle) - x[0, 2, 0, 3] * np.sin(angle)
    close(ref.rotate(x, np.arange(3), 100.0)[0, 2, 0, 2], expected)
    a, b = ref.rotate(x, [5, 6, 7]), ref.rotate(x, [[0, 1, 2]])
    close(np.einsum("bthk,bshk->ts", a, a), np.einsum("bthk,bshk->ts", b, b))


def test_attention_by_hand(rng):
    q, k, v = (rng.normal(size=(1, n, h, 4)) for n, h in ((2, 4), (3, 2), (3, 2)))
    bias, alpha, epsilon = (
        np.array([0.0, 0.1, 0.2, 0.3]),
        np.array([1.0, 2.0, 3.0, 4.0]),
        np.array([0.1, 0.2, 0.3, 0.4]),
    )
    mask = np.array([[True, False, True], [False, False, False]])
    args = dict(mask=mask, bias=bias, alpha=alpha, epsilon=epsilon)
    n = q[0, 0, 3] @ k[0, [0, 2], 1].T + 0.3
    s = 4 * n**2 / (((q[0, 0, 3] - k[0, [0, 2], 1]) ** 2).sum(-1) + 0.4) / 2
    expected = {
        "softmax": np.exp(s) / np.exp(s).sum(),
        "l1": s / (s.sum() + 0.5),
        "softermax": s**2 / (0.5 + (s**2).sum()),
    }
    for name, weights in expected.items():
        out = ref.yat_attention(q, k, v, normalization=name, power=2.0, l1_epsilon=0.5, **args)
        close(out[0, 0, 3], weights @ v[0, [0, 2], 1])
        assert np.all(out[0, 1] == 0)


def test_squashers_and_cells():
    x = np.array([0.0, 1.0, 3.0])
    close(ref.softermax(x, 2.0, 0.0), np.array([0, 0.1, 0.9]))
    close(ref.softer_sigmoid(x), np.array([0, 0.5, 0.75]))
    close(ref.soft_tanh(x, 2.0), np.array([-1, 0, 0.8]))
    close(ref.softsign(-x), np.array([0, -0.5, -0.75]))
    one = np.ones((1, 1))
    close(ref.simple_cell(one, one, lambda x: x, lambda h: 2 * h), np.array([[0.5]]))
    parts = lambda *values: lambda _: np.array([values], float)  # noqa: E731
    close(ref.gru_cell(one * -2, one, parts(1, 0, 1), parts(0, 3, 4)), np.array([[0.25 * 0.5 - 1.5]]))
    c, h = ref.lstm_cell(one * -4, one, one, parts(1, 1, 1, 1), parts(0, 2, 2, 0))
    close(c, np.array([[-3 + 0.5 * 0.5]]))
    close(h, np.array([[0.5 * -2.75 / 3.75]]))


def test_gradient_is_that_of_jax_and_its_terms_add_up(rng):
    x, w, b, a, e = rng.normal(size=(3, 4)), rng.normal(size=(4, 2)), rng.normal(size=2), np.ones(1), np.array([0.3])
    g = rng.normal(size=(3, 2))
    exact = ref.gradient(lambda x, w, b, a, e: ref.yat(x, w, bias=b, alpha=a, epsilon=e), (x, w, b, a, e), g)

    @jax.jit
    def loss(x, w, b, a, e):
        return jnp.sum(g * a * (x @ w + b) ** 2 / (jnp.sum((x[:, :, None] - w) ** 2, 1) + e))

    for (mine, size), theirs in zip(exact, jax.grad(loss, range(5))(x, w, b, a, e), strict=True):
        close(mine, np.asarray(theirs, np.float64), 1e-5)
        assert np.all(size >= np.abs(mine) - 1e-12)
    close(exact[3][1], np.sum(np.abs(g * ref.yat(x, w, bias=b, epsilon=e)))[None])


def test_every_formula_can_be_differentiated(rng):
    """Complex steps against central differences: a comparison or |·| of data on the way would break them."""
    x, h, c, w = (
        rng.uniform(0.1, 1, (1, 2)),
        rng.uniform(-1, 1, (1, 2)),
        np.array([[-1.5, 0.5]]),
        rng.normal(size=(2, 8)),
    )
    q, k, v = (rng.normal(size=(1, 2, 2, 2)) for _ in range(3))
    mask = np.array([[True, False], [True, True]])
    of = lambda n, **o: lambda x: ref.yat(x, w[:, :n], epsilon=0.5, **o)  # noqa: E731
    formulas = [
        (of(8, spherical=True, bias=0.2), (x,)),
        (of(8, weight_normalized=True), (x,)),
        (lambda x, w: ref.yat_conv(x[:, :, None], w.reshape(2, 1, 8), padding="SAME", epsilon=0.1), (x, w)),
        (lambda x, w: ref.yat_conv_transpose(x[:, :, None], w.reshape(2, 1, 8), strides=2, epsilon=0.1), (x, w)),
        (lambda q, k, v: ref.yat_attention(q, k, v, mask=mask), (q, k, v)),
        (lambda q, k, v: ref.yat_attention(q, k, v, mask=mask, normalization="l1", spherical=True), (q, k, v)),
        (lambda q: ref.yat_attention(ref.rotate(q, [3, 4]), k, v, normalization="softermax", power=1.5), (q,)),
        (lambda x: ref.softermax(x, 1.5), (x,)),
        (lambda h, x: ref.simple_cell(h, x, of(2), of(2)), (h, x)),
        (lambda h, x: ref.gru_cell(h, x, of(6), of(6)), (h, x)),
        (lambda c, h, x: np.concatenate(ref.lstm_cell(c, h, x, of(8), of(8))), (c, h, x)),
    ]
    for f, args in formulas:
        g = rng.normal(size=f(*args).shape)
        for n, (mine, _) in enumerate(ref.gradient(f, args, g)):
            direction = rng.normal(size=args[n].shape)
            moved = [f(*args[:n], args[n] + t * direction, *args[n + 1 :]) for t in (1e-5, -1e-5)]
            close(np.sum(mine * direction), np.sum(g * (moved[0] - moved[1])) / 2e-5, 1e-6)


def test_unit_vector_of_zero_is_zero_and_does_not_move():
    args = (np.zeros((1, 2)),)
    [(grad, _)] = ref.gradient(lambda x: ref.yat(x, np.eye(2), bias=1.0, spherical=True), args, np.ones((1, 2)))
    close(grad, np.zeros((1, 2)))
