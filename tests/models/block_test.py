"""Blocks of all transformers: every combination of parts, the loop through them, and how they start."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import ModelConfig
from aether.models.block import Block, stacked, through

B, T, D, LAYERS = 2, 5, 16, 3
PARTS = dict(attention=("yat", "dot", "yat_linear"), mlp=("yat", "gelu"), norm=("none", "layernorm"))
COMBINATIONS = [dict(zip(PARTS, choice, strict=True)) for choice in product(*PARTS.values())]
NAMED = {("yat", "none"), ("gelu", "layernorm")}  # of MLP and norm, as they come in the kinds; the rest is slow


def config(**model):
    return ModelConfig(
        **{"kind": "minibert", "layers": LAYERS, "heads": 4, "width": D, "dtype": "float32", **model}
    ).resolved(32)


def made(c, causal=False):
    graph = nnx.graphdef(nnx.eval_shape(lambda: stacked(c, causal, nnx.Rngs(0))))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(stacked(c, causal, nnx.Rngs(0))))())


def embeddings(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(c, id="-".join(c.values()), marks=() if (c["mlp"], c["norm"]) in NAMED else pytest.mark.slow)
        for c in COMBINATIONS
    ],
)
def test_every_combination_learns_from_both_sides(rng, parts):
    """All parameters have finite gradients that are not zero, and the first output feels the last input."""
    c = config(**parts)
    graph, params = nnx.split(made(c))

    def first(params, x):
        y = through(nnx.merge(graph, params), c, x)[0]
        return jnp.sum(jnp.sin(y[:, 0])), y

    run = jax.jit(jax.value_and_grad(first, (0, 1), has_aux=True))
    (_, y), (slopes, felt) = run(params, embeddings(rng))
    assert y.shape == (B, T, D) and y.dtype == "float32"
    for path, g in nnx.to_flat_state(slopes):
        assert np.isfinite(g[...]).all(), path
        if path[-2:] != ("key", "bias"):  # a softmax does not feel what all keys share
            assert np.abs(g[...]).max() > 0, path
    assert (np.abs(felt).sum(-1) > 1e-6).all()


def test_a_causal_block_does_not_feel_what_comes_later(rng):
    c = config()
    model = made(c, causal=True)
    felt = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(through(model, c, x)[0][:, 1]))))
    np.testing.assert_array_equal(np.abs(felt(embeddings(rng))).sum(-1) > 0, [[True, True, False, False, False]] * B)


def test_the_loop_is_one_block_after_the_other(rng):
    c, x = config(dropout=0.4), embeddings(rng)
    model, key = made(c), jax.random.key(3)
    segments, positions = jnp.asarray([[1, 1, 1, 2, 2]] * B), jnp.asarray([[0, 1, 2, 0, 1]] * B)
    graph, params = nnx.split(model)

    def by_hand(x):
        first, *rest = jax.random.split(key, LAYERS + 1)
        x = jnp.where(jax.random.bernoulli(first, 0.6, x.shape), x / 0.6, 0.0)
        for i, k in enumerate(rest):
            block = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], params))
            x, _ = block(x, positions, segments, None, k)
        return x

    def looped(x):
        return through(model, c, x, segments=segments, positions=positions, key=key)[0]

    one, other, dry = jax.jit(lambda x: (looped(x), by_hand(x), through(model, c, x)[0]))(x)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.abs(one - dry).max() > 0.1


@pytest.mark.parametrize(("features", "anchors"), [(0, 4 * 4 - 5), (24, 24 - 5)])
def test_linear_attention_has_the_features_asked_for(features, anchors):
    block = nnx.eval_shape(lambda: Block(config(attention="yat_linear", features=features), False, nnx.Rngs(0)))
    assert block.attention.anchors.shape == (4, anchors, 4) and block.attention.kind == "anchored"
    assert dict(block.attention.options) == dict(bias=0.1, epsilon=0.3)


@pytest.mark.parametrize(
    ("parts", "std"),
    [
        (dict(kind="bert"), 0.02),
        (dict(), 1 / 8),
        (dict(attention="yat_linear"), 1 / 8),
        (dict(attention="dot"), 1 / 8),
        (dict(mlp="gelu"), 1 / 8),
        (dict(attention="dot", mlp="gelu"), 0.02),
    ],
    ids=str,
)
def test_how_kernels_start(parts, std):
    """As in the usual networks only where there is no ⵟ unit; projections into the stream are small in all."""
    model = made(config(width=64, layers=1, **parts))
    starts = [(model.attention.query.kernel, std), (model.attention.out.kernel, 0.02 / 2**0.5)]
    starts += [(model.mlp.out.kernel, 0.02 / 2**0.5)]
    starts += [(model.mlp.hidden.kernel, std)] if parts.get("mlp") == "gelu" or "kind" in parts else []
    for kernel, wanted in starts:
        assert abs(float(kernel[...].std()) / wanted - 1) < 0.03


def test_wide_blocks_start_as_those_of_the_base_width_do(rng):
    """Responses, what branches add, and through b and α the scores: the same at four times the width."""

    def start(width):
        c = config(layers=1, width=width)
        block = nnx.merge(*nnx.split(Block(c, False, nnx.Rngs(0))))
        x = jnp.asarray(rng.normal(size=(4, 64, width)), jnp.float32)
        y, attended = block.mlp.hidden(x), block.attention(x)[0]
        return block.attention, [y.mean(), y.std(), block.mlp(x).std(), attended.std()]

    (small, of_small), (large, of_large) = start(128), start(512)
    np.testing.assert_allclose(of_large, of_small, rtol=0.15)
    np.testing.assert_allclose(large.alpha[...], 8 * 4**1.5, rtol=1e-6)
    np.testing.assert_allclose(large.unit()["bias"], 0.1 / 2, rtol=1e-5)
    np.testing.assert_allclose(small.alpha[...], 8.0)


def test_narrow_blocks_plain_ones_and_baselines_keep_what_they_are_given():
    for parts in (dict(width=64), dict(width=512, spherical=False)):
        mlp = Block(config(layers=1, **parts), False, nnx.Rngs(0)).mlp.hidden
        np.testing.assert_allclose(mlp.alpha[...], 16.0)
        np.testing.assert_allclose(mlp.unit()["bias"], 0.1, rtol=1e-5)
    assert config(width=512, spherical=False).times_wider == (1.0, 1.0), "nor do α's steps grow where α does not"
    out = Block(config(kind="bert", layers=1, width=512), False, nnx.Rngs(0)).mlp.out
    np.testing.assert_allclose(np.std(out.kernel[...]), 0.02 / 2**0.5, rtol=0.02)
