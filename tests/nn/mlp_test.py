"""`YatMLP`: the two layers it stands for, with every option of theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn import KernelBank, YatMLP

OPTIONS = [
    dict(),
    dict(spherical=True, softplus_bias=True, bias_init=0.1, learnable_epsilon=True, out_bias=False),
    dict(use_bias=False, constant_alpha=True, weight_normalized=True, out_std=0.1),
    dict(scalar_bias=True, use_alpha=False),
    dict(constant_bias=-0.5, positive_init=True),
    dict(distance="exact"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_its_two_layers(rng, options):
    mlp = YatMLP(5, 11, 3, rngs=nnx.Rngs(0), **options)
    x = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    graph, params = nnx.split(mlp)

    def loss(params, fused):
        layer = nnx.merge(graph, params)
        return jnp.sum(jnp.sin(layer(x) if fused else layer.out(layer.hidden(x))))

    np.testing.assert_allclose(mlp(x), mlp.out(mlp.hidden(x)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mlp(x[0, 0]), mlp(x)[0, 0], rtol=1e-5, atol=1e-5)
    grads = [jax.jit(jax.grad(loss), static_argnums=1)(params, fused) for fused in (True, False)]
    for a, b in zip(*(jax.tree.leaves(g) for g in grads), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_names_widths_and_a_bank():
    bank = KernelBank((6, 32), rngs=nnx.Rngs(1))
    mlp = YatMLP(6, 16, kernel_bank=bank, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert mlp(jnp.ones((2, 6))).shape == (2, 6) and mlp(jnp.ones((2, 6))).dtype == jnp.bfloat16
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(mlp))}
    assert names == {"hidden/alpha", "hidden/bias", "hidden/kernel_bank/kernel", "out/kernel", "out/bias"}


def test_a_key_drops_connections(rng):
    mlp = YatMLP(5, 11, drop_rate=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    key = jax.random.key(3)
    np.testing.assert_allclose(mlp(x, key=key), mlp.out(mlp.hidden(x, key=key)), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(mlp(x, key=key) - mlp(x)).max()) > 1e-3


def test_a_wrong_width_is_refused():
    mlp = YatMLP(5, 11, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="in_features is 5"):
        mlp(jnp.ones((2, 6)))
