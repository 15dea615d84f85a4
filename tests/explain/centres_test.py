"""Centres for new units: directions of what a layer is given, as long as its own."""

import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.centres import drawn
from aether.explain.layers import layer_of, seen
from aether.testing import drawn_state, inputs_of, network_config


def directions(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("network", "name"), [("aether", "blocks.1.mlp.hidden"), ("aether_resnet", "stages.0.0.hidden")]
)
def test_centres_are_points_of_the_layers_length(network, name):
    model, x = nnx.merge(*drawn_state(network_config(network))), inputs_of(network_config(network), 2)
    made = drawn(model, [x], {name: 5})[name]
    given = seen(model, x)[name].x
    if given.ndim == 4:
        padded = np.pad(given, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # (b, h, w, c, 3, 3)
        given = windows.transpose(0, 1, 2, 4, 5, 3)
    points = given.reshape(-1, made.shape[1])
    alike = directions(made.astype(np.float64)) @ directions(points.astype(np.float64)).T
    np.testing.assert_allclose(alike.max(-1), 1.0, rtol=1e-5)
    assert len(set(alike.argmax(-1))) == 5
    kernel = np.asarray(layer_of(model, name).kernel[...]).reshape(made.shape[1], -1)
    np.testing.assert_allclose(np.linalg.norm(made, axis=-1), np.median(np.linalg.norm(kernel, axis=0)), rtol=1e-5)


def test_noise_moves_centres_by_a_share_of_the_data():
    model, x = nnx.merge(*drawn_state(network_config("aether"))), inputs_of(network_config("aether"), 4)
    name = "blocks.1.mlp.hidden"
    exact, near, far = (drawn(model, [x], {name: 8}, noise=noise)[name] for noise in (0.0, 0.05, 1.0))
    alike = [np.sum(directions(exact) * directions(other), -1) for other in (near, far)]
    assert 0.98 < alike[0].min() < 1 - 1e-5 and alike[1].mean() < 0.9
    np.testing.assert_allclose(np.linalg.norm(far, axis=-1), np.linalg.norm(exact, axis=-1), rtol=1e-5)


def test_too_few_points_or_no_such_layer_is_said():
    model, x = nnx.merge(*drawn_state(network_config("aether"))), inputs_of(network_config("aether"), 1)
    with pytest.raises(InputError, match="blocks.0.mlp.hidden has 12 inputs and 13 centres are to be drawn"):
        drawn(model, [x], {"blocks.0.mlp.hidden": 13})
    with pytest.raises(InputError, match="There is no hidden ⵟ layer 'head'; there are blocks.0.mlp.hidden"):
        drawn(model, [x], {"head": 2})
