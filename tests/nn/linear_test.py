"""Linear maps, convolutions, tables and layer normalisation against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn import Conv, Embed, LayerNorm, Linear
from tools import reference


def test_linear(rng):
    layer = Linear(6, 4, std=0.5, rngs=nnx.Rngs(0))
    x = np.asarray(rng.normal(size=(2, 3, 6)), np.float32)
    assert (layer.bias[...] == 0).all()
    layer.bias[...] = jnp.arange(4.0)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[...]) + np.arange(4), rtol=1e-4, atol=1e-5)
    assert abs(float(Linear(200, 100, std=0.5, rngs=nnx.Rngs(0)).kernel[...].std()) - 0.5) < 0.01
    assert Linear(6, 4, std=0.5, use_bias=False, rngs=nnx.Rngs(0)).bias is None
    assert Linear(6, 4, std=0.5, dtype="bfloat16", rngs=nnx.Rngs(0))(x).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("size", "sides", "options"),
    [
        (3, (5,), dict(padding="CAUSAL")),
        ((3, 3), (5, 6), dict(strides=2, padding=1)),
        ((1, 1), (3, 4), dict(strides=2, padding=0)),
        ((7, 7), (6, 5), dict(strides=2, padding=3)),
        ((2, 3), (4, 4), dict(padding="SAME")),
        ((3, 3), (4, 4), dict(padding=1, zero_sum=True)),
    ],
)
def test_conv(rng, size, sides, options):
    """Forward and gradients are those of the formula, by complex steps in float64."""
    layer = Conv(2, 3, size, **options, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(rng.normal(size=3), jnp.float32)
    graph, params = nnx.split(layer)
    x = np.asarray(rng.normal(size=(2, *sides, 2)), np.float32)

    window = {k: v for k, v in options.items() if k != "zero_sum"}

    def formula(x, w, b):
        w = w - w.mean(tuple(range(w.ndim - 1))) if "zero_sum" in options else w
        return reference.yat_conv(x, w, **window, of=lambda patch, kernel: patch @ kernel) + b

    want = formula(np.float64(x), layer.kernel[...], np.asarray(layer.bias[...]))
    y = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    g = np.asarray(rng.normal(size=want.shape), np.float32)
    loss = jax.grad(lambda p, x: jnp.sum(g * nnx.merge(graph, p)(x)), (0, 1))
    of_params, of_x = jax.jit(loss)(params, x)
    slopes = reference.gradient(formula, (x, layer.kernel[...], layer.bias[...]), g)
    for got, (value, terms) in zip((of_x, of_params["kernel"][...], of_params["bias"][...]), slopes, strict=True):
        assert (np.abs(got - value) <= 1e-5 * terms + 1e-6).all()


def test_conv_starts_with_outputs_as_large_as_inputs_and_keeps_its_options():
    layer = Conv(16, 64, (3, 3), axes=("mlp", None), dtype="bfloat16", rngs=nnx.Rngs(0))
    assert abs(float(layer.kernel[...].std()) - 144**-0.5) < 0.002 and not layer.bias[...].any()
    assert layer.kernel.get_metadata()["axes"] == (None, None, "mlp", None)
    assert layer(jnp.ones((1, 4, 4, 16))).dtype == "bfloat16"
    assert Conv(2, 3, 3, use_bias=False, rngs=nnx.Rngs(0)).bias is None
    ones = Conv(2, 3, 3, kernel_init=jax.nn.initializers.ones, rngs=nnx.Rngs(0))
    assert (ones.kernel[...] == 1).all()
    with pytest.raises(ValueError, match="padding is 'CAUSAL'"):
        Conv(2, 3, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0))


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
