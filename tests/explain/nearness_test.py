"""Distances to centres and confidence against float64 NumPy, from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain import nearness
from aether.explain.layers import blocks_of, seen
from aether.explain.nearness import NEAR, distances, measuring, near, sure
from aether.explain.points import points_of
from aether.nn import YatConv2D, YatNMN
from aether.testing import drawn_state, inputs_of, network_config

ROWS = 3


def softplus(parameter):
    return np.log1p(np.exp(np.asarray(parameter[...], np.float64)))


def brute(layer, points):
    """Return the scores of each point and log(D + ε) of each pair, by differences in float64."""
    x, w = (np.asarray(a, np.float64) for a in (points, layer.kernel[...]))
    w = w.reshape(-1, w.shape[-1]).T
    if layer.spherical:
        x, w = (a / np.sqrt((a * a).sum(-1, keepdims=True)) for a in (x, w))
    square = ((x[:, None] - w) ** 2).sum(-1)
    bias = softplus(layer.bias) if layer.bias is not None else 0.0
    y = np.asarray(layer.alpha[...], np.float64) * (x @ w.T + bias) ** 2 / (square + softplus(layer.epsilon_param))
    lengths = (x * x).sum(-1)[:, None] + (w * w).sum(-1)
    found = dict(distance=square.min(-1), relative=(square / lengths).min(-1), response=-np.abs(y).max(-1))
    return found | dict(total=-np.abs(y).sum(-1), profile=np.log(square + softplus(layer.epsilon_param)))


@pytest.mark.parametrize("network", ["aether_plain", "aether_vit", "aether_resnet_head", "aether_resnet_deep"])
def test_scores_of_layers_are_their_definitions(network, model):
    x = inputs_of(network_config(network), ROWS)
    layers = {n: s for n, s in seen(model(network), x).items() if isinstance(s.layer, YatNMN | YatConv2D)}
    found = measuring(model(network))(x)
    assert list(found.near) == list(found.profile) == list(layers) and len(layers) >= 2
    by = dict(aether_plain="distance", aether_resnet_head="total").get(network)
    each = {by: distances(model(network), by, places=True)(x)} if by else {}
    for name, layer in layers.items():
        wanted = brute(layer.layer, points_of(layer.layer, layer.x))
        for key in NEAR:
            of_places = wanted[key].reshape(ROWS, -1)
            scale = np.abs(of_places).max()
            np.testing.assert_allclose(found.near[name][key], of_places.mean(-1), rtol=1e-4, atol=1e-5 * scale)
            if key in each:
                np.testing.assert_allclose(each[key][name], of_places, rtol=1e-3, atol=1e-4 * scale)
        profile = wanted["profile"].reshape(ROWS, -1, wanted["profile"].shape[-1]).mean(1)
        np.testing.assert_allclose(found.profile[name], profile, rtol=1e-4, atol=1e-4)
        units = np.asarray(layer.y, np.float64).reshape(ROWS, -1, layer.y.shape[-1]).mean(1)
        np.testing.assert_allclose(found.units[name], units, rtol=1e-4, atol=1e-5 * np.abs(units).max())


def test_groups_see_their_own_channels(rng):
    layer = YatConv2D(4, 6, 3, strides=2, feature_group_count=2, epsilon=0.3, rngs=nnx.Rngs(0))
    x = rng.normal(size=(2, 7, 7, 4)).astype(np.float32)
    found = near(layer, jnp.asarray(x), layer(jnp.asarray(x)))
    padded, kernel = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64), np.asarray(layer.kernel[...])
    for b, i, j, unit in ((0, 0, 0, 1), (1, 2, 3, 2), (1, 3, 1, 3), (0, 1, 3, 5)):
        part = slice(0, 2) if unit < 3 else slice(2, 4)
        square = ((padded[b, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, part] - kernel[..., unit]) ** 2).sum()
        assert found["profile"][b, 4 * i + j, unit] == pytest.approx(np.log(square + 0.3), abs=1e-4)


def test_a_zero_input_of_spherical_units_is_one_away():
    layer = YatNMN(4, 3, spherical=True, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 2, 4))
    found = near(layer, x, layer(x))
    assert found["distance"].tolist() == [[1.0, 1.0]] and found["relative"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("network", ["resnet", "gpt2", "bert"])
def test_confidence_is_the_largest_probability(network, model):
    config = network_config(network)
    x, made = inputs_of(config, ROWS), model(network)
    y = made(jnp.asarray(x))
    if x.ndim == 2:
        hidden = np.asarray(y[0] if isinstance(y, tuple) else y, np.float64)
        logits = hidden @ np.asarray(made.head_kernel(), np.float64)[:, : made.vocab]
    else:
        logits = np.asarray(y, np.float64)[:, None]
    top = logits.max(-1)
    log_z = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    found = sure(made)(x)
    np.testing.assert_allclose(found.confidence, np.exp(top - log_z).mean(-1), rtol=2e-4)
    np.testing.assert_allclose(found.energy, -log_z.mean(-1), rtol=2e-4)
    causal = config.model.task == "lm"
    last = -1 if causal else None
    np.testing.assert_array_equal(found.guess, logits.argmax(-1)[:, :last])
    np.testing.assert_allclose(found.each, np.exp(top - log_z)[:, :last], rtol=5e-4)
    assert (found.nll is not None) == causal
    if causal:
        right = np.take_along_axis(logits[:, :-1], x[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(found.nll, (log_z[:, :-1] - right).mean(-1), rtol=2e-4)


@pytest.mark.parametrize("network", ["resnet", "resnet_deep", "gpt2"])
def test_of_a_baseline_hidden_units_and_blocks_are_seen(network, model):
    x, made = inputs_of(network_config(network), ROWS), model(network)
    found = measuring(made)(x)
    units, stream = (walked if network == "gpt2" else walked_resnet)(made, jnp.asarray(x))
    assert list(found.near) == list(found.profile) == ["head"] * (network == "resnet_deep")
    suffix = ".mlp.hidden" if network == "gpt2" else ""
    assert [k for k in found.units if k != "head"] == [name + suffix for name in units]
    assert list(found.stream) == list(stream) == list(blocks_of(made))
    for name in stream:
        for got, wanted in ((found.units[name + suffix], units[name]), (found.stream[name], stream[name])):
            wanted = wanted.reshape(ROWS, -1, wanted.shape[-1]).mean(1)
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def walked_resnet(model, x):
    """Return the hidden units and the output of each block, one after the other."""
    x, units, stream = model.stem(x, False), {}, {}
    if model.config.stem == "imagenet":
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for name, block in blocks_of(model).items():
        units[name] = block.hidden(block.reduce(x, False) if block.reduce else x, False)
        stream[name] = x = block(x, False)
    return units, stream


def walked(model, ids):
    """Return the same of a text model with learned positions."""
    x, units, stream = model.gain * model.embed(ids) + model.position.embedding[...][: ids.shape[1]], {}, {}
    for name, block in blocks_of(model).items():
        x = x + block.attention(block.norm1(x), is_causal=block.causal)[0]
        units[name] = jax.nn.gelu(block.mlp.hidden(block.norm2(x)))
        stream[name] = x = x + block.mlp(block.norm2(x))
    return units, stream


def test_batches_are_filled_up_and_cut_again(model, monkeypatch):
    x = inputs_of(network_config("aether_resnet_head"), 5)
    whole = measuring(model("aether_resnet_head"))(x)
    monkeypatch.setattr(nearness, "_PLACES", 2 * 16 * 16)
    parts = measuring(model("aether_resnet_head"))(x)
    assert list(parts.near) == list(whole.near) and list(parts.near)[-1] == "head"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole, parts)
    assert parts.sure.guess.shape == (5, 1)


def test_an_answer_that_is_no_number_is_no_guess():
    made = nnx.merge(*drawn_state(network_config("resnet")))
    made.head.kernel[...] = made.head.kernel[...].at[0, 0].set(jnp.nan)
    found = sure(made)(inputs_of(network_config("resnet"), 2))
    assert (found.guess == -1).all() and (found.each == 0).all() and (found.confidence == 0).all()


def test_wrong_arguments_are_one_sentence(model):
    for call, said in (
        (lambda: distances(model("aether"), "cosine"), "by is 'cosine'; it takes one of distance, relative, response"),
        (lambda: distances(model("gpt2")), "The network has no ⵟ units with prototypes to be far from"),
        (lambda: sure(model("resnet"))(np.zeros((0, 16, 16, 3))), "There is no input to look at"),
    ):
        with pytest.raises(InputError, match=said):
            call()
