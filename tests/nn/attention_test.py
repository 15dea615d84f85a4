"""The attention layer: its parameters, its cache, and its rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.kernels.attention import causal_mask
from aether.nn import Attention, KVCache, YatAttention


def make(kind, **kwargs):
    options = dict(std=0.4, out_std=0.4, rngs=nnx.Rngs(0), **kwargs)
    if kind == "dot":
        return Attention(8, 2, **options)
    return YatAttention(8, 2, bias=0.2, alpha=8.0, epsilon=0.3, spherical=True, **options)


def test_the_yat_parameters_are_one_a_head():
    layer = make("yat")
    for name, value in layer.unit().items():
        np.testing.assert_allclose(value, [dict(bias=0.2, alpha=8.0, epsilon=0.3)[name]] * 2, rtol=1e-5)
    for name in ("bias", "alpha", "epsilon_param"):
        assert getattr(layer, name).get_metadata()["axes"] == ("heads",)
    assert not hasattr(make("dot"), "alpha")


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="8 and num_heads 3"):
        Attention(8, 3, std=1.0, out_std=1.0, rngs=nnx.Rngs(0))


def test_heads_are_apart(rng):
    """The value of head 1 reaches the output only through rows 4 to 7 of the output kernel."""
    layer = make("dot", use_bias=False)
    x = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    layer.out.kernel[...] = layer.out.kernel[...].at[4:].set(0.0)
    before, _ = layer(x, jnp.zeros((1, 3), jnp.int32), causal_mask(3, 3))
    layer.value.kernel[...] = layer.value.kernel[...].at[:, 4:].set(9.0)
    after, _ = layer(x, jnp.zeros((1, 3), jnp.int32), causal_mask(3, 3))
    np.testing.assert_array_equal(before, after)
    layer.value.kernel[...] = layer.value.kernel[...].at[:, :4].set(9.0)
    assert (layer(x, jnp.zeros((1, 3), jnp.int32), causal_mask(3, 3))[0] != before).all()


@pytest.mark.parametrize("kind", ["dot", "yat"])
def test_the_cache_gives_what_the_whole_gives(rng, kind):
    layer = make(kind, rope_theta=100.0)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    at = jnp.broadcast_to(jnp.arange(5), (2, 5))

    @jax.jit
    def both(x):
        whole, none = layer(x, at, causal_mask(5, 5))
        cache = KVCache(jnp.zeros((2, 7, 2, 4)), jnp.zeros((2, 7, 2, 4)), jnp.asarray(0))
        head, cache = layer(x[:, :3], at[:, :3], causal_mask(3, 7, 0), cache)
        tail, cache = layer(x[:, 3:], at[:, 3:], causal_mask(2, 7, 3), cache)
        return whole, none, jnp.concatenate([head, tail], 1), cache.length

    whole, none, pieces, length = both(x)
    assert none is None and length == 5
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)


def test_rotation_needs_positions_and_only_with_theta(rng):
    x = jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32)
    at, spread = jnp.arange(4)[None], 3 * jnp.arange(4)[None]
    mask = causal_mask(4, 4)
    for theta, same in ((None, True), (100.0, False)):
        layer = make("dot", rope_theta=theta)
        equal = jnp.allclose(layer(x, at, mask)[0], layer(x, spread, mask)[0], atol=1e-6)
        assert bool(equal) == same
