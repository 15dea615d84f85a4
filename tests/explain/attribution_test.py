"""Shares in a logit: they add up, to the layers' and to the whole, and each is what leaving it out takes away."""

import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.attribution import attribute
from aether.testing import NETWORKS, TEXTS, drawn_state, inputs_of, network_config

TARGET = 1
SOME = ("aether", "gpt2", "minibert_linear", "aether_vit", "aether_resnet", "resnet")


def made(name):
    config = network_config(name)
    model = nnx.merge(*drawn_state(config))
    return config, model, inputs_of(config, rows=1)[0]


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_shares_add_up(name):
    config, model, x = made(name)
    found = attribute(model, x, TARGET, -2 if name in TEXTS else -1)
    whole = model(x[None])
    if name in TEXTS:
        whole = model.logits(whole[0] if config.model.task == "lm" else whole)[:, -2]
    size = sum(map(abs, found.layers.values()))
    assert found.logit == pytest.approx(float(whole[0, TARGET]), rel=1e-4, abs=1e-5 * size)
    assert abs(sum(found.layers.values()) - found.logit) <= 1e-5 * size
    first, *middle, last = found.layers
    assert first in ("embed", "stem") and last == "constant"
    assert list(found.units) == [layer for layer in middle if layer in found.units]
    assert len({round(v, 12) for v in found.layers.values()}) > 3  # no two alike: something was computed
    for parts in (found.units, found.sources):
        for layer, shares in parts.items():
            size = np.abs(shares).sum() + abs(found.bias[layer])
            assert abs(shares.sum() + found.bias[layer] - found.layers[layer]) <= 1e-5 * size, layer
    for weights in found.weights.values():
        sums = weights.sum(-1)
        assert (sums < 1.0001).all() and ("linear" in name or (sums > 0.9999).all())  # features have a floor
    for parts in (found.units, found.sources):
        assert parts and all(np.isfinite(a).all() and a.any() for a in parts.values())


@pytest.mark.parametrize("name", ["aether", "minibert"])
def test_a_share_is_what_goes_with_a_unit(name):
    """Behind the last layer all is linear: units whose readout is set to zero take their shares from the logit."""
    _, model, x = made(name)
    before = attribute(model, x, TARGET)
    last = list(before.units)[-1]
    units = np.argsort(-np.abs(before.units[last]))[:2]
    kernel = np.array(model.blocks.mlp.out.kernel[...])
    kernel[-1, units] = 0
    model.blocks.mlp.out.kernel[...] = kernel
    after = attribute(model, x, TARGET)
    size = sum(map(abs, before.layers.values()))
    assert before.logit - after.logit == pytest.approx(before.units[last][units].sum(), abs=1e-5 * size)
    assert not after.units[last][units].any() and after.layers[last] != before.layers[last]


def test_places_of_an_image():
    """A patch far from the others: what a convolution's places share is highest where something is."""
    _, model, x = made("aether_resnet")
    blank = np.zeros_like(x)
    flat = attribute(model, blank, TARGET).sources["stages.0.0"]
    blank[1, 1] = 3.0
    spot = attribute(model, blank, TARGET).sources["stages.0.0"]
    changed = np.abs(spot - flat)
    assert changed[:4, :4].max() > 1e3 * changed[5:, 5:].max()


def test_the_largest_first():
    _, model, x = made("aether")
    found = attribute(model, x, TARGET)
    units, sources = found.top_units(5), found.top_sources(5)
    sizes = [abs(share) for _, _, share in units]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == max(np.abs(a).max() for a in found.units.values())
    layer, place, share = sources[0]
    assert share == pytest.approx(found.sources[layer].sum(0)[place])


@pytest.mark.parametrize(
    ("name", "x", "target", "position", "said"),
    [
        ("aether", np.zeros((2, 3), np.int32), 0, -1, r"\(2, 3\); give one row of ids"),
        ("aether", np.zeros(3, np.int32), 99, -1, "target is 99; the network has logits 0 to"),
        ("aether", np.zeros(3, np.int32), 0, 3, "position is 3; the text has 3"),
        ("aether_vit", np.zeros((2, 8, 8, 3), np.float32), 0, -1, "give one image"),
    ],
)
def test_what_is_not_there(name, x, target, position, said):
    with pytest.raises(InputError, match=said):
        attribute(made(name)[1], x, target, position)
