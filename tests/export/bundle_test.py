"""Bundles: the NumPy reader computes what Aether computes, in float64 too, and states come back."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.export.bundle import parameters_of, state_of
from aether.export.reference import numpy_model
from aether.kernels.yat import yat
from aether.models import describe_model
from aether.testing import NETWORKS, drawn_state, network_config


@pytest.mark.parametrize("name", NETWORKS)
def test_numpy_computes_the_same(name, exported):
    folder, x, wanted, got = exported(name, "npz")
    exact = numpy_model.load(str(folder), "float64")(x)
    assert got.dtype == np.float32 and exact.dtype == np.float64 and exact.std() > 1e-3
    np.testing.assert_allclose(wanted, exact, rtol=0, atol=3e-5 * np.abs(exact).max())
    np.testing.assert_allclose(got, exact, rtol=0, atol=3e-5 * np.abs(exact).max())


def test_directions_of_nothing(exported):
    """A blank patch has no direction: its distance to a unit prototype counts as 2."""
    folder, *_ = exported("aether_resnet_deep", "npz")
    with np.load(folder / "parameters.npz") as file:
        parameters = {name: file[name] for name in file.files}
    w = parameters["stages.0.0.hidden.kernel"].reshape(-1, 6)
    numbers = [parameters[f"stages.0.0.hidden.{name}"] for name in ("bias", "alpha", "epsilon_param")]
    bias, epsilon = np.log1p(np.exp(numbers[0])), np.log1p(np.exp(numbers[2]))
    blank = np.zeros((1, len(w)), np.float32)
    got = numpy_model.kernel_unit(blank, w, True, bias, numbers[1], epsilon)
    wanted = yat(jnp.asarray(blank), jnp.asarray(w), bias=bias, alpha=numbers[1], epsilon=epsilon, spherical=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["aether", "minibert_linear", "aether_resnet"])
def test_rounded_parameters(name, exported):
    _, _, wanted, got = exported(name, "npz", "bfloat16")
    np.testing.assert_allclose(wanted, got, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_comes_back(name):
    config = network_config(name)
    _, state = drawn_state(config)
    parameters = parameters_of(config, state)
    like = nnx.merge_state(*describe_model(config)[1:])
    again = parameters_of(config, state_of(config, like, parameters))
    assert parameters.keys() == again.keys()
    for key, value in parameters.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_what_is_not_the_network_is_refused():
    config = network_config("gpt2")
    parameters = parameters_of(config, drawn_state(config)[1])
    like = nnx.merge_state(*describe_model(config)[1:])
    name = "blocks.1.mlp.out.kernel"
    for changed, said in (
        ({k: v for k, v in parameters.items() if k != name}, f"no array {name}"),
        (parameters | {name: parameters[name][:-1]}, r"\(23, 16\).*\(24, 16\)"),
        (parameters | {"blocks.2.mlp.out.kernel": parameters[name]}, "has an array blocks.2.mlp.out.kernel"),
    ):
        with pytest.raises(InputError, match=said):
            state_of(config, like, changed)
