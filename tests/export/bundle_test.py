"""Bundles: the NumPy reader computes what Aether computes, in float64 too, and states come back bit by bit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.export import npz
from aether.export.bundle import facts_of, parameters_of, state_of
from aether.export.reference import numpy_model
from aether.models import describe_model
from aether.testing import NETWORKS, drawn_state, inputs_of, network_config


def logits_of(config, graph, state, x):
    @jax.jit
    def forward(state, x):
        model = nnx.merge(graph, state)
        if config.model.task == "classify":
            return model(x)
        hidden = model(x)
        return model.logits(hidden[0] if config.model.task == "lm" else hidden)

    return np.asarray(forward(state, jnp.asarray(x)))


def written(folder, config, state, dtype="float32"):
    npz.write(folder, parameters_of(config, state, dtype))
    (folder / "config.json").write_text(json.dumps({"network": facts_of(config)}))
    return numpy_model


@pytest.mark.parametrize("name", NETWORKS)
def test_numpy_computes_the_same(name, tmp_path):
    config = network_config(name)
    graph, state = drawn_state(config)
    x = inputs_of(config)
    wanted = logits_of(config, graph, state, x)
    got = written(tmp_path, config, state).load(str(tmp_path), "float64")(x)
    assert got.dtype == np.float64 and got.std() > 1e-3
    np.testing.assert_allclose(wanted, got, rtol=0, atol=3e-5 * np.abs(got).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_comes_back(name):
    config = network_config(name)
    _, state = drawn_state(config)
    parameters = parameters_of(config, state)
    like = nnx.merge_state(*describe_model(config)[1:])
    again = parameters_of(config, state_of(config, like, parameters))
    assert parameters.keys() == again.keys()
    for key, value in parameters.items():
        np.testing.assert_allclose(again[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
