"""How parameters are born, and how layers are stacked."""

import jax
import numpy as np
import pytest
from flax import nnx

from aether.nn import Linear, YatNMN
from aether.nn.param import constant, normal, softplus_inverse, stack


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.unit = YatNMN(3, 5, rngs=rngs)
        self.out = Linear(5, 3, std=0.1, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x):
        return self.out(self.unit(x))


@pytest.fixture(scope="module")
def stacked():
    return stack(Pair, 4, nnx.Rngs(0))


def test_normal_and_constant():
    p = normal(jax.random.key(0), (200, 300), 0.5, ("embed", "mlp"))
    assert abs(float(p[...].std()) - 0.5) < 0.01 and p.get_metadata()["axes"] == ("embed", "mlp")
    q = constant((3,), 2.0, (None,))
    assert q[...].tolist() == [2.0] * 3 and q[...].dtype == "float32" and q.get_metadata()["axes"] == (None,)


@pytest.mark.parametrize("value", [1e-6, 0.1, 1.0, 30.0])
def test_softplus_inverse(value):
    np.testing.assert_allclose(jax.nn.softplus(softplus_inverse(value)), value, rtol=1e-5)


def test_stack_names_the_new_axis(stacked):
    for path, v in nnx.to_flat_state(nnx.state(stacked)):
        axes = v.get_metadata()["axes"]
        assert axes[0] == "layers" and len(axes) == v[...].ndim and v[...].shape[0] == 4, path
    assert stacked.unit.kernel.get_metadata()["axes"] == ("layers", "embed", "mlp")


def test_stack_gives_each_layer_its_own_kernel(stacked):
    kernel = np.asarray(stacked.unit.kernel[...])
    assert kernel.shape == (4, 3, 5)
    assert len(np.unique(kernel)) == kernel.size
    again = stack(Pair, 4, nnx.Rngs(0)).unit.kernel[...]
    np.testing.assert_array_equal(kernel, again)


def test_a_stack_is_scanned_as_its_layers_in_turn(stacked, rng):
    x = np.asarray(rng.normal(size=(2, 3)), np.float32)
    graph, state = nnx.split(stacked)
    one, _ = jax.lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, state)
    for i in range(4):
        layer = jax.tree.map(lambda a: a[i], state)  # noqa: B023
        x = nnx.merge(graph, layer)(x)
    np.testing.assert_allclose(one, x, rtol=1e-5)
