"""Attention, plain and block by block, against NumPy in float64: values, gradients, causality, rows without keys."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.attention import DotScore, YatScore, attention
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from tools import reference as ref

B, T, H, G, K = 2, 7, 4, 2, 6
BLOCK = 3  # does not divide T
UNIT = dict(bias=np.array([0.1, 0.4, 0.0, 0.7]), alpha=np.array([3.0, 2.0, 1.0, 4.0]), epsilon=np.linspace(0.3, 0.9, H))
NORMALIZATIONS = [
    Normalization(),
    Normalization("l1", constant=1e-2),
    Normalization("softermax", 2.0),
    Normalization("softermax", 0.5, 1e-2),
]
label = "{0.name}-{0.power}".format
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2]])
rng0 = np.random.default_rng(1)
VALID = rng0.random((B, T)) < 0.7
DENSE = rng0.random((B, H, T, T)) < 0.6
TRI = np.tri(T, dtype=bool)
# Name -> what is told, and the same as booleans that broadcast to (b, h, t, s).
MASKS = dict(
    all=(dict(), True),
    causal=(dict(causal=True), TRI),
    window=(dict(window=3), TRI & ~np.tri(T, k=-3, dtype=bool)),
    segments=(
        dict(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS),
        TRI & (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None]),
    ),
    padding=(dict(valid=VALID), VALID[:, None, None]),
    dense=(dict(dense=DENSE), DENSE),
)


def mask_of(name):
    return Mask(**{k: jnp.asarray(v) if np.ndim(v) else v for k, v in MASKS[name][0].items()})


def make(rng, t=T, s=T, g=G, width=5):
    sizes = ((B, t, H, K), (B, s, g, K), (B, s, g, width))
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]


def yat(spherical=False, **changes):
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in (UNIT | changes).items()}
    return YatScore(**arrays, spherical=spherical, nonnegative_bias=True)


def exact(q, k, v, n, mask, **scores):
    constant = n.constant if np.ndim(n.constant) == 0 else np.reshape(n.constant, (-1, 1, 1))
    options = dict(normalization=n.name, power=n.power, l1_epsilon=constant)
    return ref.yat_attention(q, k, v, mask=mask, **options, **(UNIT | scores))


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
@pytest.mark.parametrize("n", NORMALIZATIONS, ids=label)
def test_values(rng, n, impl):
    """Every normalisation with every mask, grouped heads; then cross attention, and as many key heads as queries'."""
    own, cross, equal = make(rng), make(rng, 4, 8), make(rng, g=H)

    @jax.jit
    def run(own, cross, equal, masks):
        f = partial(attention, normalization=n, impl=impl, block=BLOCK)
        values = {name: f(*own, yat(), mask=mask) for name, mask in masks.items()}
        return values, f(*cross, yat()), f(*equal, yat(), mask=masks["causal"])

    values, crossed, equalled = run(own, cross, equal, {name: mask_of(name) for name in MASKS})
    for name, value in values.items():
        np.testing.assert_allclose(value, exact(*own, n, MASKS[name][1]), atol=1e-5, err_msg=name)
    np.testing.assert_allclose(crossed, exact(*cross, n, None), atol=1e-5)
    np.testing.assert_allclose(equalled, exact(*equal, n, TRI), atol=1e-5)


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
def test_the_other_scores(rng, impl):
    """Dot product, unit vectors, distance by differences, and a negative bias; bfloat16 operands."""
    q, k, v = make(rng)
    unit_q, unit_k = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    below = UNIT["bias"] - 0.5

    @jax.jit
    def run(q, k, unit_q, unit_k, v):
        f = partial(attention, mask=Mask(causal=True), impl=impl, block=BLOCK)
        apart = YatScore(*(jnp.asarray(a, jnp.float32) for a in UNIT.values()), distance="exact")
        negative = YatScore(*(jnp.asarray(a, jnp.float32) for a in (below, UNIT["alpha"], UNIT["epsilon"])))
        half = [a.astype(jnp.bfloat16) for a in (unit_q, unit_k, v)]
        return (
            f(q, k, v, DotScore()),
            f(unit_q, unit_k, v, yat(True)),
            f(q, k, v, apart),
            f(q, k, v, negative),
            f(q, k, v, YatScore(0.1, 2.0, 0.3)),
            f(*half, yat(True)),
        )

    dot, spherical, apart, negative, shared, half = run(q, k, unit_q, unit_k, v)
    n = Normalization()
    np.testing.assert_allclose(spherical, exact(q, k, v, n, TRI, spherical=True), atol=1e-5)
    np.testing.assert_allclose(apart, exact(q, k, v, n, TRI), atol=1e-5)
    np.testing.assert_allclose(negative, exact(q, k, v, n, TRI, bias=below), atol=1e-5)
    np.testing.assert_allclose(shared, exact(q, k, v, n, TRI, bias=0.1, alpha=2.0, epsilon=0.3), atol=1e-5)
    assert half.dtype == "bfloat16"
    np.testing.assert_allclose(half.astype(jnp.float32), spherical, atol=0.05)
    scores = np.einsum("bthk,bshk->bhts", np.float64(q), np.repeat(np.float64(k), H // G, 2)) / np.sqrt(K)
    weights = ref.attention_weights(scores, TRI)
    np.testing.assert_allclose(dot, np.einsum("bhts,bshk->bthk", weights, np.repeat(v, H // G, 2)), atol=1e-5)


@pytest.mark.parametrize("n", NORMALIZATIONS, ids=label)
def test_gradients_of_the_plain_form_by_complex_steps(rng, n):
    q, k, v = (rng.normal(size=size).astype(np.float32) for size in ((1, 3, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2)))
    parts = [*(UNIT[name][:2].astype(np.float32) for name in UNIT), np.array([0.2, 0.5], np.float32)]
    seen = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
    g = rng.normal(size=q.shape).astype(np.float32)

    def f(q, k, v, bias, alpha, epsilon, constant):
        weighting = replace(n, constant=constant)
        return exact(q, k, v, weighting, seen, bias=bias, alpha=alpha + 0j, epsilon=epsilon)

    @jax.jit
    def grads(*args):
        def run(q, k, v, *unit):
            score, weighting = YatScore(*unit[:3], nonnegative_bias=True), replace(n, constant=unit[3])
            return attention(q, k, v, score, mask=Mask(dense=jnp.asarray(seen)), normalization=weighting)

        return jax.vjp(run, *args)[1](jnp.asarray(g))

    got = grads(*(jnp.asarray(a) for a in (q, k, v, *parts)))
    for mine, (right, size) in zip(got, ref.gradient(f, (q, k, v, *parts), g), strict=True):
        assert (np.abs(mine - right) <= 1e-5 * size.max() + 1e-6).all()


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
def test_no_query_feels_what_it_may_not_see(rng, impl):
    """By gradient, for every mask: d(output at t)/d(key or value at s) is zero just where the mask says so."""
    q, k, v = make(rng)
    cotangent = jnp.asarray(rng.normal(size=(B, T, H, 5)), jnp.float32)

    @jax.jit
    def felt(k, v, masks):
        def one(mask):
            y, back = jax.vjp(lambda k, v: attention(q, k, v, yat(), mask=mask, impl=impl, block=BLOCK), k, v)
            rows = jax.vmap(back)(cotangent * jnp.eye(T)[:, None, :, None, None])
            return [jnp.abs(r).sum((-1, -2)).swapaxes(0, 1) for r in rows]  # (b, t, s)

        return {name: one(mask) for name, mask in masks.items()}

    names = [name for name in MASKS if "causal" in MASKS[name][0] or "window" in MASKS[name][0]]
    for name, (by_key, by_value) in felt(k, v, {name: mask_of(name) for name in names}).items():
        seen = np.broadcast_to(MASKS[name][1], (B, 1, T, T))[:, 0]
        np.testing.assert_array_equal(np.asarray(by_value) > 0, seen, err_msg=name)
        alone = seen.sum(-1, keepdims=True) == 1  # the weight of an only key is 1, whatever the key
        np.testing.assert_array_equal(np.asarray(by_key) > 1e-6, seen & ~alone, err_msg=name)


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
@pytest.mark.parametrize("n", NORMALIZATIONS[:2], ids=label)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_none(rng, n, impl):
    args = make(rng)
    dense = DENSE & (np.arange(T) != 4)[:, None] & (np.arange(T) != 2)
    mask = Mask(dense=jnp.asarray(dense))

    @jax.jit
    def run(*args):
        f = lambda q, k, v: attention(q, k, v, yat(), mask=mask, normalization=n, impl=impl, block=BLOCK)  # noqa: E731
        y, back = jax.vjp(f, *args)
        return y, back(jnp.ones_like(y))

    y, grads = run(*args)
    assert (np.asarray(y)[:, 4] == 0).all() and (np.asarray(y)[:, :4] != 0).any((2, 3)).all()
    assert all(np.isfinite(g).all() for g in grads)
    for gradient, at in zip(grads, (4, 2, 2), strict=True):
        assert (np.asarray(gradient)[:, at] == 0).all()


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
def test_extreme_scores_stay_finite(rng, impl):
    """Squares of 1e22 overflow, and some weights vanish: outputs and gradients are finite and outputs right."""
    q, k, v = make(rng)
    scales = np.array([1e4, 1e-6])[:, None, None, None]
    q, k = q * scales.astype(np.float32), k * scales.astype(np.float32)
    flat = {k: np.float32(v) for k, v in dict(bias=0.0, alpha=1.0, epsilon=1e-6).items()}

    @jax.jit
    def run(q, k, v):
        def one(n):
            f = lambda *a: attention(*a, YatScore(**flat), normalization=n, impl=impl, block=BLOCK)  # noqa: E731
            y, back = jax.vjp(f, q, k, v)
            return y, back(y)

        return [one(n) for n in NORMALIZATIONS[:3]]

    for n, (y, grads) in zip(NORMALIZATIONS, run(q, k, v), strict=False):
        assert all(np.isfinite(a).all() for a in (y, *grads)), n
        if n.name != "softmax":
            np.testing.assert_allclose(y, exact(q, k, v, n, None, **flat), rtol=1e-3, atol=1e-5)


def test_negative_scores_count_for_nothing_where_weights_are_not_exponentials(rng):
    q, k, v = make(rng)
    below = yat(alpha=UNIT["alpha"] * np.array([1, -1, 1, 1]))
    for n in NORMALIZATIONS[1:3]:
        for impl in ("plain", "blockwise"):
            y = np.asarray(
                jax.jit(lambda n=n, impl=impl: attention(q, k, v, below, normalization=n, impl=impl, block=3))()
            )
            right = exact(q, k, v, n, None)
            assert (y[:, :, 1] == 0).all()
            np.testing.assert_allclose(np.delete(y, 1, 2), np.delete(right, 1, 2), atol=1e-5)


def test_bad_input_is_named(rng):
    q, k, v = make(rng)
    bad = [
        ((q, k, v, yat()), dict(impl="Plain"), "impl is 'Plain'; it must be one of auto, plain, blockwise, flash"),
        ((q, k, v, yat()), dict(impl="flash"), "There is no flash kernel for cpu.*only for tpu"),
        ((q, k, v, yat()), dict(block=0), "block is 0; it must be at least 1"),
        ((q, k, v, yat()), dict(normalization=Normalization("L1")), "'L1'; it must be one of softmax, l1, softermax"),
        ((q, k, v, yat()), dict(normalization=Normalization("l1", 2.0)), "power is 2.0 with l1"),
        ((q, k, v, yat()), dict(normalization=Normalization("softermax", 0.0)), "power is 0.0 with softermax"),
        ((q, k, v, yat()), dict(normalization=Normalization("l1", constant=0.0)), "constant is 0.0"),
        (
            (q, k, v, yat()),
            dict(normalization=Normalization("l1", constant=jnp.ones(3))),
            r"constant is \(3,\).*\(4,\)",
        ),
        ((q, k, v, DotScore()), dict(normalization=Normalization("l1")), "products may be negative"),
        ((q, k[:, :, :1], v, yat()), {}, r"\(2, 7, 4, 6\), \(2, 7, 1, 6\) and \(2, 7, 2, 5\)"),
        ((q[:, :, :3], k, v, yat()), {}, "q's heads, 3, must be a multiple of k's, 2"),
        ((q[..., :5], k, v, yat()), {}, "they must be"),
        ((q.astype(jnp.bfloat16), k, v, yat()), {}, "bfloat16, float32 and float32"),
        ((q, k, v, yat()), dict(mask=Mask(valid=jnp.ones((B, 2), bool))), r"valid is \(2, 2\)"),
    ]
    for args, options, message in bad:
        with pytest.raises(ValueError, match=message):
            attention(*args, **options)
