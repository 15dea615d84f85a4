"""The dense ⵟ layer: its parameters, their starting values, and its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn import YatNMN


def make(**kwargs):
    return YatNMN(6, 4, **(dict(softplus_bias=True, bias_init=0.1, learnable_epsilon=True) | kwargs), rngs=nnx.Rngs(0))


def test_parameters_carry_the_names_and_layouts_of_the_field():
    shapes = {path[-1]: v[...].shape for path, v in nnx.to_flat_state(nnx.state(make()))}
    assert shapes == {"kernel": (6, 4), "bias": (4,), "alpha": (1,), "epsilon_param": (1,)}
    axes = {path[-1]: v.get_metadata()["axes"] for path, v in nnx.to_flat_state(nnx.state(make()))}
    assert axes == {"kernel": ("embed", "mlp"), "bias": ("mlp",), "alpha": (None,), "epsilon_param": (None,)}


def test_bias_alpha_and_epsilon_start_as_asked():
    unit = make(bias_init=0.7, alpha_init=16.0, epsilon=0.3).unit()
    for name, value in dict(bias=0.7, alpha=16.0, epsilon=0.3).items():
        np.testing.assert_allclose(unit[name], value, rtol=1e-5)


def test_prototypes_start_near_unit_length():
    layer = YatNMN(256, 64, rngs=nnx.Rngs(0))
    assert abs(float(jnp.linalg.norm(layer.kernel[...], axis=0).mean()) - 1.0) < 0.05
    assert (
        abs(
            float(YatNMN(256, 64, kernel_init=nnx.initializers.normal(0.02), rngs=nnx.Rngs(0)).kernel[...].std()) - 0.02
        )
        < 1e-3
    )


@pytest.mark.parametrize("spherical", [False, True])
def test_is_the_formula(rng, spherical):
    layer = make(bias_init=0.7, alpha_init=2.0, epsilon=0.3, spherical=spherical)
    x, w = rng.normal(size=(2, 3, 6)), np.asarray(layer.kernel[...], float)
    y = layer(jnp.asarray(x, jnp.float32))
    if spherical:
        x, w = x / np.linalg.norm(x, axis=-1, keepdims=True), w / np.linalg.norm(w, axis=0)
    gap = ((x[..., None] - w) ** 2).sum(-2)
    np.testing.assert_allclose(y, 2.0 * (x @ w + 0.7) ** 2 / (gap + 0.3), rtol=1e-4)


def test_computes_in_the_dtype_asked_for(rng):
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    half = make(dtype="bfloat16")
    assert half(x).dtype == "bfloat16" and half.kernel[...].dtype == "float32"
    np.testing.assert_allclose(half(x), make()(x), rtol=0.1, atol=1e-2)


def test_every_parameter_learns(rng):
    graph, params = nnx.split(make())
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(x).sum()))(params)
    assert all((g != 0).all() for g in jax.tree.leaves(grads))
