"""The blockwise form against the plain one: gradients, memory, and what it does not compute."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.attention import DotScore, YatScore, attention
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.testing import equations

IMPLS = ("plain", "blockwise")
B, T, H, G, K = 2, 11, 4, 2, 6
NAMES = ("q", "k", "v", "bias", "alpha", "epsilon", "constant")
NORMALIZATIONS = [Normalization(), Normalization("l1"), Normalization("softermax", 2.0)]
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (B, T)), 1))


def loss(impl, n, block, q, k, v, bias, alpha, epsilon, constant, mask, **score):
    n, score = replace(n, constant=constant), YatScore(bias, alpha, epsilon, **score)
    y = attention(q, k, v, score, mask=mask, normalization=n, impl=impl, block=block)
    return jnp.sum(jnp.sin(3 * y)), y


def make(rng, t=T, s=T, bias=0.3):
    arrays = [rng.normal(size=size) for size in ((B, t, H, K), (B, s, G, K), (B, s, G, 5))]
    arrays += [bias + 0.1 * np.arange(H), 1.0 + np.arange(H), 0.3 + 0.1 * np.arange(H), 0.1 + 0.1 * np.arange(H)]
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def compare(n, block, args, masks, **score):
    """Assert that values and gradients are the plain form's, for masks that differ in their arrays alone."""

    @jax.jit
    def both(args, mask):
        run = [jax.grad(partial(loss, impl, n, block, **score), range(7), has_aux=True) for impl in IMPLS]
        return [f(*args, mask) for f in run]

    for mask in masks:
        (plain, y), (blocks, y_blocks) = both(args, mask)
        np.testing.assert_allclose(y_blocks, y, atol=1e-5)
        for name, one, other in zip(NAMES, plain, blocks, strict=True):
            assert np.linalg.norm(one) > 1e-3 or (name == "constant" and n.name == "softmax"), name
            assert np.linalg.norm(one - other) <= 1e-5 * max(1.0, np.linalg.norm(one)), name


@pytest.mark.parametrize("n", NORMALIZATIONS, ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("block", "structure"),
    [pytest.param(4, dict(causal=True), id="causal"), pytest.param(3, dict(window=4), id="window")],
)
def test_gradients_equal_the_plain_form_s(rng, n, block, structure):
    compare(n, block, make(rng), [Mask(**structure)], nonnegative_bias=True)


@pytest.mark.parametrize("n", NORMALIZATIONS, ids=lambda n: n.name)
def test_gradients_equal_with_segments_padding_and_a_dense_mask(rng, n):
    nothing = dict(query_segments=0 * SEGMENTS, key_segments=0 * SEGMENTS)
    nothing |= dict(valid=jnp.ones((B, T), bool), dense=jnp.ones((B, H, T, T), bool))
    told = [
        dict(query_segments=SEGMENTS, key_segments=SEGMENTS),
        dict(valid=jnp.asarray(rng.random((B, T)) < 0.7)),
        dict(dense=jnp.asarray(rng.random((B, H, T, T)) < 0.6)),
    ]
    compare(n, 5, make(rng), [Mask(**nothing | some) for some in told], nonnegative_bias=True)


@pytest.mark.parametrize(
    ("sizes", "mask", "score"),
    [
        pytest.param((7, 13), dict(), dict(), id="cross"),
        pytest.param((5, 12), dict(causal=True, offset=6), dict(bias=-0.4), id="after a cache, b < 0"),
        pytest.param((T, T), dict(causal=True), dict(distance="exact"), id="exact"),
        pytest.param((T, T), dict(causal=True), dict(spherical=True), id="spherical"),
    ],
)
def test_gradients_equal_for_other_shapes_and_scores(rng, sizes, mask, score):
    q, k, *rest = make(rng, *sizes, bias=score.pop("bias", 0.3))
    if score.get("spherical"):
        q, k = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    compare(Normalization(), 4, (q, k, *rest), [Mask(**mask)], **score)


def test_dot_products_in_bfloat16(rng):
    """Values and gradients as near to float32's as the plain form's are."""
    q, k, v, *_ = make(rng)

    @jax.jit
    def run(q, k, v):
        def grads(impl, dtype):
            def f(*args):
                y = attention(*(a.astype(dtype) for a in args), DotScore(), mask=Mask(window=6), impl=impl, block=4)
                return jnp.sum(jnp.sin(3 * y.astype(jnp.float32)))

            return jax.grad(f, (0, 1, 2))(q, k, v)

        return grads("plain", jnp.float32), grads("plain", jnp.bfloat16), grads("blockwise", jnp.bfloat16)

    for right, plain, blocks in zip(*run(q, k, v), strict=True):
        assert np.linalg.norm(blocks - right) <= 1.5 * np.linalg.norm(plain - right) < 0.1 * np.linalg.norm(right)


@pytest.mark.parametrize("score", [DotScore(), YatScore(0.1, 2.0, 0.3)], ids=["dot", "yat"])
def test_nothing_as_large_as_the_scores_is_ever_made(score):
    """No equation of the forward or backward pass has a result with two axes of the length, nor booleans."""
    t = 4099  # blocks of 256 leave a rest

    def f(impl, q, k, v, segments):
        mask = Mask(causal=True, query_segments=segments, key_segments=segments)
        return jnp.sum(attention(q, k, v, score, mask=mask, impl=impl))

    x = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, t), jnp.int32)
    largest = {}
    for impl in IMPLS:
        jaxpr = jax.make_jaxpr(jax.grad(partial(f, impl), (0, 1, 2)))(x, x, x, segments).jaxpr
        largest[impl] = max(v.aval.size for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "size"))
    assert largest["plain"] >= t * t and largest["blockwise"] <= 2 * 256**2


def test_memory_is_a_twentieth(rng):
    def f(impl, *args):
        return jnp.sum(attention(*args, YatScore(0.1, 2.0, 0.3), mask=Mask(causal=True), impl=impl))

    x = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    grads = [jax.jit(jax.grad(partial(f, i), (0, 1, 2))).lower(x, x, x) for i in IMPLS]
    plain, blocks = (g.compile().memory_analysis().temp_size_in_bytes for g in grads)
    assert blocks * 20 <= plain


def test_a_longer_sequence_costs_a_window_only_its_share(rng):
    """The blocks that are visited are counted by a score that calls back."""
    visits = []

    def count(window, t):
        visits.clear()
        q = jnp.ones((1, t, 1, 2))
        run = jax.jit(
            lambda q: attention(q, q, q, Counted(), mask=Mask(causal=True, window=window), impl=impl, block=8)
        )
        jax.block_until_ready(run(q))
        jax.effects_barrier()
        return len(visits)

    @jax.tree_util.register_static
    class Counted:
        def __call__(self, q, k):
            jax.debug.callback(lambda: visits.append(1))
            return jnp.einsum("...tk,...sk->...ts", q, k)

    impl = "blockwise"
    assert count(None, 64) == 8 * 9 / 2  # of 64
    assert count(8, 64) == 15 and count(8, 128) == 31
