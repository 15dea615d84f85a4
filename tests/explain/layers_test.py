"""The ⵟ layers of every network: their names, and that what is seen of them is what they compute."""

import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.layers import blocks_of, layer_of, layers_of, seen, wrapped
from aether.nn import Attention, YatAttention, YatLinearAttention, YatNMN
from aether.testing import drawn_state, inputs_of, network_config


def made(name):
    config = network_config(name)
    return nnx.merge(*drawn_state(config)), inputs_of(config, rows=2)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("aether", ["blocks.0.attention", "blocks.0.mlp.hidden", "blocks.1.attention", "blocks.1.mlp.hidden"]),
        ("gpt2", []),
        ("resnet", []),
    ],
)
def test_names(name, layers):
    model, _ = made(name)
    assert list(layers_of(model)) == layers and len(blocks_of(model)) >= 2


@pytest.mark.parametrize("name", ["aether", "minibert_linear", "aether_vit", "aether_resnet_head"])
def test_what_is_seen_is_what_the_layer_computes(name):
    model, x = made(name)
    found = seen(model, x)
    assert list(found) == list(layers_of(model)) and len(found) >= 3
    for layer, given, gave in found.values():
        attends = isinstance(layer, YatAttention | YatLinearAttention)
        again = layer(given, is_causal=name == "aether")[0] if attends else layer(given)
        np.testing.assert_allclose(again, gave, rtol=1e-4, atol=1e-5 * np.abs(gave).max())


def test_a_layer_that_is_not_there_is_named_with_those_that_are():
    model, _ = made("aether")
    assert layer_of(model, "blocks.1.mlp.hidden").kernel_shape[0] == 16
    with pytest.raises(InputError, match="'blocks.7.mlp.hidden'.*there are blocks.0.attention, blocks.0.mlp.hidden"):
        layer_of(model, "blocks.7.mlp.hidden")
    with pytest.raises(InputError, match=r"there are blocks.0.mlp.hidden, blocks.1.mlp.hidden\."):
        layer_of(model, "blocks.0.attention", YatNMN)
    with pytest.raises(InputError, match="none: the network has no ⵟ units"):
        layer_of(made("gpt2")[0], "blocks.0.mlp.hidden")


def test_wrapped_calls_are_afterwards_what_they_were():
    """A class that inherits its call inherits it again: a later wrapper of the parent's must reach it."""
    told, before = [], Attention.__call__

    def telling(kind, call):
        return lambda *args: told.append(kind)

    for kinds in ((YatAttention, Attention), (Attention,)):
        told.clear()
        with wrapped(kinds, telling) as calls:
            YatAttention.__call__(None)
            Attention.__call__(None)
            assert calls == dict.fromkeys(kinds, before)
        assert told == [kinds[0], Attention]
    assert "__call__" not in vars(YatAttention) and YatAttention.__call__ is Attention.__call__ is before
    with pytest.raises(RuntimeError), wrapped((YatNMN,), telling):
        raise RuntimeError
    assert "lambda" not in repr(YatNMN.__call__)
