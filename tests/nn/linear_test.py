"""Linear maps, tables and layer normalisation against NumPy."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from aether.nn import Embed, LayerNorm, Linear


def test_linear(rng):
    layer = Linear(6, 4, std=0.5, rngs=nnx.Rngs(0))
    x = np.asarray(rng.normal(size=(2, 3, 6)), np.float32)
    assert (layer.bias[...] == 0).all()
    layer.bias[...] = jnp.arange(4.0)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[...]) + np.arange(4), rtol=1e-4, atol=1e-5)
    assert abs(float(Linear(200, 100, std=0.5, rngs=nnx.Rngs(0)).kernel[...].std()) - 0.5) < 0.01
    assert Linear(6, 4, std=0.5, use_bias=False, rngs=nnx.Rngs(0)).bias is None
    assert Linear(6, 4, std=0.5, dtype="bfloat16", rngs=nnx.Rngs(0))(x).dtype == "bfloat16"


def test_embed():
    table = Embed(10, 4, std=2.0, rngs=nnx.Rngs(0))
    ids = np.array([[1, 9], [0, 1]])
    np.testing.assert_array_equal(table(ids), np.asarray(table.embedding[...])[ids])
    assert table(ids).dtype == "float32" and table.embedding.get_metadata()["axes"] == ("vocab", "embed")


def test_layer_norm(rng):
    layer = LayerNorm(16)
    x = rng.normal(size=(3, 16)) * 100 + 1000
    scale, bias = rng.normal(size=16), rng.normal(size=16)
    layer.scale[...], layer.bias[...] = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), want, atol=1e-3)
    assert LayerNorm(4, use_bias=False).bias is None
    assert LayerNorm(4, dtype="bfloat16")(jnp.ones((2, 4))).dtype == "bfloat16"
