"""Hidden units come and go: what the networks compute, in float64 NumPy, and every array, against brute force."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from aether.arrays import named_leaves
from aether.errors import InputError
from aether.explain.duplicates import close_pairs, equal_units
from aether.explain.surgery import FIRST, SECOND, added, merged, places_of, removed
from aether.export.bundle import facts_of, parameters_of
from aether.export.reference import numpy_model
from aether.models import describe_model
from aether.testing import drawn_state, inputs_of, network_config

NAMES = ["aether", "aether_plain", "minibert_linear", "aether_vit", "aether_resnet", "aether_resnet_deep"]
FUNCTIONS = dict(
    gpt=numpy_model.text_model, bert=numpy_model.text_model, vit=numpy_model.vit, resnet=numpy_model.resnet
)


@pytest.fixture(params=NAMES)
def network(request):
    """A config, its module, the arrays of its parameters by path, and where hidden layers are."""
    config = network_config(request.param)
    model = nnx.merge(*drawn_state(config))
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.state(model)).items()}
    return config, model, arrays, places_of(model)


def logits(config, arrays, change=0):
    """What the network with these arrays computes, in float64; `change` is that of `model.hidden`."""
    hidden = (config.model.hidden or config.model.width) + change
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=hidden))
    like = nnx.merge_state(*describe_model(config)[1:])
    wanted = named_leaves(like)
    assert {name: leaf.shape for name, leaf in wanted.items()} == {name: a.shape for name, a in arrays.items()}
    state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
    parameters = {name: np.asarray(a, np.float64) for name, a in parameters_of(config, state).items()}
    x = inputs_of(config)
    return FUNCTIONS[config.model.family](parameters, facts_of(config), x * 1.0 if x.ndim == 4 else x)


def near(a, b, tolerance=1e-6):
    assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


def own(arrays, place, role):
    """A layer's own array, that of all units last of a kernel and last but one of a readout."""
    whole = arrays[f"{place.stack}/{role}"]
    return whole if place.block is None else whole[place.block]


def centres_of(arrays, place):
    return own(arrays, place, "hidden/kernel").reshape(-1, place.units).T


def put(arrays, place, kept, gone, scale=1.0):
    """Make unit `gone` of a layer the same as `kept`, its centre `scale` times as long."""
    for role, factor in (("hidden/kernel", scale), ("hidden/bias", 1.0)):
        if f"{place.stack}/{role}" in arrays:
            arrays[f"{place.stack}/{role}"] = arrays[f"{place.stack}/{role}"].copy()
            a = own(arrays, place, role)
            a[..., gone] = factor * a[..., kept]


def test_more_units_change_nothing(network, rng):
    config, _, arrays, places = network
    centres = {
        name: rng.normal(size=(3 * place.share, centres_of(arrays, place).shape[1])) for name, place in places.items()
    }
    new = added(arrays, places, centres)
    near(logits(config, arrays), logits(config, new, 3))
    for name, place in places.items():
        kernel, out = own(new, place, "hidden/kernel"), own(new, place, "out/kernel")
        grown = kernel.reshape(-1, kernel.shape[-1]).T
        np.testing.assert_array_equal(grown[: place.units], centres_of(arrays, place))
        np.testing.assert_array_equal(grown[place.units :], centres[name].astype(np.float32))
        assert not out[..., place.units :, :].any()
        if f"{place.stack}/hidden/bias" in arrays:
            before, bias = own(arrays, place, "hidden/bias"), own(new, place, "hidden/bias")
            np.testing.assert_array_equal(bias[: place.units], before)
            np.testing.assert_allclose(bias[place.units :], before.mean(), rtol=1e-5)
    for what in (FIRST, SECOND):
        moments = added(arrays, places, centres, what)
        for name, a in arrays.items():
            more = [(0, after - n) for after, n in zip(new[name].shape, a.shape, strict=True)]
            np.testing.assert_array_equal(moments[name], np.pad(a, more))


def test_equal_units_become_one(network):
    config, model, arrays, places = network
    spherical = config.model.conv_spherical if config.model.family == "resnet" else config.model.spherical
    arrays, wanted = dict(arrays), {}
    for name, place in places.items():
        wanted[name] = [(k, k + place.units // 2) for k in range(2 * place.share)]
        for kept, gone in wanted[name]:
            put(arrays, place, kept, gone, 2.0 if spherical else 1.0)
    found = equal_units([arrays], model, 1e-7)
    assert {name: sorted(pairs) for name, pairs in found.items()} == wanted
    before = logits(config, arrays)
    near(before, logits(config, merged(arrays, places, found), -2))
    gone = {name: [pair[1] for pair in pairs] for name, pairs in found.items()}
    assert np.abs(before - logits(config, removed(arrays, places, gone), -2)).max() > 1e-3


def test_moments_of_units_that_become_one(network, rng):
    _, _, arrays, places = network
    moments = {name: rng.uniform(size=a.shape).astype(np.float32) for name, a in arrays.items()}
    pairs = {
        name: [(2, 1), (2, 0), *((3, 4 + k) for k in range(2 * place.share - 2))] for name, place in places.items()
    }
    first, second = (merged(moments, places, pairs, what) for what in (FIRST, SECOND))
    for name, place in places.items():
        gone = sorted(g for _, g in pairs[name])
        old, out = own(moments, place, "hidden/kernel"), own(moments, place, "out/kernel")
        np.testing.assert_allclose(own(first, place, "hidden/kernel")[..., 0], old[..., :3].sum(-1), rtol=1e-6)
        root = np.sqrt(old[..., :3].astype(np.float64)).sum(-1)
        np.testing.assert_allclose(own(second, place, "hidden/kernel")[..., 0], root**2, rtol=1e-5)
        rest = [u for u in range(place.units) if u not in gone]
        for done in (first, second):
            np.testing.assert_array_equal(own(done, place, "out/kernel"), out[..., rest, :])


def test_units_that_go_take_their_part_along(network):
    config, _, arrays, places = network
    units = {name: [1, *range(3, 2 + 2 * place.share)] for name, place in places.items()}
    new = removed(arrays, places, units)
    silent = dict(arrays)
    for name, place in places.items():
        rest = [u for u in range(place.units) if u not in units[name]]
        np.testing.assert_array_equal(own(new, place, "hidden/kernel"), own(arrays, place, "hidden/kernel")[..., rest])
        key = f"{place.stack}/out/kernel"
        out = own(arrays, place, "out/kernel")
        if place.centred:
            out = out - out.mean((0, 1, 2), dtype=np.float64)
        np.testing.assert_allclose(own(new, place, "out/kernel"), out[..., rest, :], atol=3e-6)
        silent[key] = silent[key].copy()
        own(silent, place, "out/kernel")[..., units[name], :] = 0.0
    if config.model.family != "resnet":  # whose means change
        near(logits(config, silent), logits(config, new, -2), 1e-12)


def test_what_cannot_be_done_is_said():
    config = network_config("aether_resnet")
    model = nnx.merge(*drawn_state(config))
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.state(model)).items()}
    places = places_of(model)
    first, second, third = places
    fair = {first: [0], second: [0, 1], third: [0, 1]}
    widths = {name: centres_of(arrays, place).shape[1] for name, place in places.items()}
    for units, said in (
        (fair | {third: [0]}, "Of stages.1.1.hidden 1 units are to go and of stages.0.0.hidden 1"),
        ({first: [0], second: [0, 1]}, "Of stages.1.1.hidden 0 units"),
        (fair | {second: [0, 16]}, "There is no unit 16 in stages.1.0.hidden; it has units 0 to 15"),
        (fair | {second: [0, -1]}, "There is no unit -1"),
        (fair | {second: [4, 4]}, "Unit 4 of stages.1.0.hidden is named twice"),
        (fair | {"blocks.0.mlp.hidden": [1]}, "There is no hidden ⵟ layer 'blocks.0.mlp.hidden'; there are stages.0.0"),
        ({first: range(8), second: range(16), third: range(16)}, "All 8 units of stages.0.0.hidden are named"),
    ):
        with pytest.raises(InputError, match=said.replace("(", r"\(")):
            removed(arrays, places, units)
    with pytest.raises(InputError, match="Unit 1 of stages.0.0.hidden is to be kept and to go"):
        merged(arrays, places, {first: [(0, 1), (1, 2)]})
    with pytest.raises(InputError, match=f"The centres of {first} have 5 entries; they take {widths[first]}"):
        added(arrays, places, {n: np.ones((p.share, 5 if n == first else widths[n])) for n, p in places.items()})
    with pytest.raises(InputError, match="model.kind=gpt2 and model.mlp=gelu has no hidden ⵟ units"):
        places_of(nnx.merge(*drawn_state(network_config("gpt2"))))


@pytest.mark.parametrize("relative", [True, False])
def test_close_pairs_are_those_of_brute_force(relative, rng):
    w = rng.normal(size=(600, 5)) * rng.uniform(0.5, 2, (600, 1))
    w[[40, 599]] = w[[3, 550]]
    lengths = np.linalg.norm(w, axis=-1)
    gaps = np.linalg.norm(w[:, None] - w, axis=-1)
    for tolerance in (0.0, 0.2):
        limit = tolerance * (np.maximum(lengths[:, None], lengths) if relative else 1.0)
        wanted = {(i, j) for i, j in np.argwhere(gaps <= limit) if i < j}
        found = close_pairs(w, tolerance, relative=relative)
        assert {pair[:2] for pair in found} == wanted and len(wanted) == len(found) > 1
        np.testing.assert_allclose([pair[2] for pair in found], sorted(gaps[i, j] for i, j in wanted))


def test_units_must_be_equal_in_the_averages_and_the_biases_too():
    model = nnx.merge(*drawn_state(network_config("aether")))
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.state(model)).items()}
    places = places_of(model)
    name, place = next(iter(places.items()))
    average = dict(arrays)
    for kept, gone in ((4, 9), (9, 2), (6, 7), (10, 11)):
        put(arrays, place, kept, gone)
    for kept, gone in ((4, 9), (9, 2), (10, 11)):
        put(average, place, kept, gone)
    own(arrays, place, "hidden/bias")[11] += 0.5
    other = [n for n in places if n != name]
    assert equal_units([arrays, average], model, 0.0) == {name: [(2, 4), (2, 9)], **{n: [] for n in other}}
    assert equal_units([arrays], model, 0.0)[name] == [(2, 4), (2, 9), (6, 7)]
