"""BatchNorm against NumPy in float64 and PyTorch: statistics, running ones, gradients, and the same over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import MeshConfig
from aether.nn import BatchNorm
from aether.parallel import make_mesh, to_global
from tools import reference


def normalised(x, scale, bias):
    """The formula, over all axes but the last; complex numbers pass, for `reference.gradient`."""
    axes = tuple(range(x.ndim - 1))
    off = x - x.mean(axes)
    return off / np.sqrt((off * off).mean(axes) + 1e-5) * scale + bias


def drawn(rng, features=3, **options):
    layer = BatchNorm(features, **options)
    for variable in (layer.scale, layer.bias, layer.mean):
        variable[...] = jnp.asarray(rng.normal(size=features), jnp.float32)
    layer.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=features), jnp.float32)
    return layer


def call(layer, x, train, mesh=None):
    """Return the result, the gradients by parameters and x of its sum of sines, and what the call made of the state."""
    graph, params, statistics = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graph, params, statistics, copy=True)  # variables of this trace, which may be changed
        y = model(x, train)
        return jnp.sum(jnp.sin(y)), (y, nnx.state(model, nnx.BatchStat))

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    if mesh is None:
        slopes, (y, after) = step(params, jnp.asarray(x))
    else:
        with jax.set_mesh(mesh):
            slopes, (y, after) = step(params, to_global({"x": x}, mesh)["x"])
    return y, slopes, nnx.merge(graph, params, after)


def inputs(rng, *shape):
    return np.asarray(rng.normal(size=shape) * 3 + 5, np.float32)


def test_in_training_the_batch_decides_and_the_running_statistics_follow(rng):
    layer, x = drawn(rng, momentum=0.7), inputs(rng, 4, 5, 6, 3)
    y, _, after = call(layer, x, True)
    np.testing.assert_allclose(y, normalised(np.float64(x), layer.scale[...], layer.bias[...]), atol=2e-5)
    for name, of_batch in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        want = 0.7 * np.asarray(getattr(layer, name)[...]) + 0.3 * of_batch
        np.testing.assert_allclose(getattr(after, name)[...], want, rtol=1e-4)


def test_outside_training_the_running_statistics_decide_and_stay(rng):
    layer, x = drawn(rng), inputs(rng, 2, 5, 3)
    y, _, after = call(layer, x, False)
    mean, var, scale, bias = (np.float64(v[...]) for v in (layer.mean, layer.var, layer.scale, layer.bias))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after.mean[...], layer.mean[...])
    np.testing.assert_array_equal(after.var[...], layer.var[...])


def test_gradients_are_those_of_the_formula(rng):
    layer, x = drawn(rng), inputs(rng, 2, 2, 3, 3)
    y, (of_params, of_x), _ = call(layer, x, True)
    want = reference.gradient(normalised, (x, layer.scale[...], layer.bias[...]), np.cos(np.float64(y)))
    for got, (value, size) in zip((of_x, of_params["scale"][...], of_params["bias"][...]), want, strict=True):
        assert (np.abs(got - value) <= 2e-5 * size + 1e-5).all()


def test_is_pytorch_s(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
    layer, x = drawn(rng), inputs(rng, 4, 5, 6, 3)
    y, (of_params, of_x), after = call(layer, x, True)
    its = {k: torch.tensor(np.asarray(getattr(layer, k)[...])) for k in ("mean", "var", "scale", "bias")}
    moved = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
    scale, bias = its["scale"].requires_grad_(), its["bias"].requires_grad_()
    z = torch.nn.functional.batch_norm(moved, its["mean"], its["var"], scale, bias, training=True, momentum=0.1)
    z.sin().sum().backward()
    np.testing.assert_allclose(np.moveaxis(np.asarray(y), -1, 1), z.detach().numpy(), atol=3e-5)
    np.testing.assert_allclose(np.moveaxis(np.asarray(of_x), -1, 1), moved.grad.numpy(), atol=3e-5)
    np.testing.assert_allclose(of_params["scale"][...], scale.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after.mean[...], its["mean"].numpy(), rtol=1e-5)
    unbiased = 4 * 5 * 6 / (4 * 5 * 6 - 1)  # PyTorch's running variance divides by n − 1
    batch = (np.asarray(after.var[...]) - 0.9 * np.asarray(layer.var[...])) / 0.1
    np.testing.assert_allclose(its["var"].numpy(), 0.9 * layer.var[...] + 0.1 * batch * unbiased, rtol=1e-4)


@pytest.mark.parametrize("sizes", [dict(data=-1), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_over_a_mesh_the_statistics_are_those_of_the_global_batch(rng, sizes):
    """Each device's rows have a mean of their own, so that statistics of a device alone would be far off."""
    layer = drawn(rng)
    x = inputs(rng, 16, 2, 3, 3) + 10 * np.arange(16, dtype=np.float32)[:, None, None, None]
    one = call(layer, x, True)
    mesh = make_mesh(MeshConfig(**sizes))
    many = call(layer, x, True, mesh)
    np.testing.assert_allclose(one[0], many[0], atol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[2].var[...], many[2].var[...], rtol=1e-5)
    assert one[2].var[...].min() > 100


def test_a_variance_far_from_zero_is_not_lost_once_the_mean_is_known(rng):
    layer, x = BatchNorm(3), np.asarray(rng.normal(size=(64, 3)) + 1e4, np.float32)
    layer.mean[...] = jnp.full(3, 1e4, jnp.float32)
    y = call(layer, x, True)[0]
    np.testing.assert_allclose(y, normalised(np.float64(x), 1.0, 0.0), atol=1e-3)


def test_dtypes_names_and_options():
    layer = BatchNorm(4, scale_init=0.0, axis="embed", dtype="bfloat16")
    assert layer(jnp.ones((2, 4), jnp.bfloat16), False).dtype == "bfloat16" and not layer.scale[...].any()
    assert layer.mean[...].dtype == layer.var[...].dtype == "float32"
    assert {v.get_metadata()["axes"] for _, v in nnx.to_flat_state(nnx.state(layer))} == {("embed",)}
    assert set(nnx.state(layer, nnx.Param)) == {"scale", "bias"}
    with pytest.raises(ValueError, match="momentum is 1.0"):
        BatchNorm(4, momentum=1.0)
