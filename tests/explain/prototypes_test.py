"""Prototypes and data against brute force in float64 NumPy, from the definition, by differences."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.layers import layer_of, seen
from aether.explain.prototypes import (
    as_images,
    compared,
    duplicates,
    first_layer,
    nearest_prototypes,
)
from aether.explain.survey import nearest_inputs, silent_units
from aether.nn import YatNMN
from aether.testing import drawn_state, inputs_of, network_config

LAYERS = [("aether", "blocks.1.mlp.hidden"), ("aether_resnet", "stages.1.1.hidden"), ("aether_vit", "head")]


def brute(layer, points):
    """Return distances and responses (n, units) in float64, pair by pair."""
    x, w = (np.asarray(a, np.float64) for a in (points, layer.kernel[...]))
    w = w.reshape(-1, w.shape[-1]).T
    if layer.spherical:
        x, w = (a / np.sqrt((a * a).sum(-1, keepdims=True)) for a in (x, w))
    gaps = ((x[:, None] - w) ** 2).sum(-1)
    soft = [np.log1p(np.exp(np.asarray(p[...], np.float64))) for p in (layer.bias, layer.epsilon_param)]
    return np.sqrt(gaps), float(layer.alpha[0]) * (x @ w.T + soft[0]) ** 2 / (gaps + soft[1])


def patches_of(x):
    """Cut 3x3 patches of (b, h, w, c) with zeros around it, places row by row, entries in the kernel's order."""
    b, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.stack([padded[n, i : i + 3, j : j + 3].ravel() for n in range(b) for i in range(h) for j in range(w)])


def points(found):
    return patches_of(found.x) if found.x.ndim == 4 else found.x.reshape(-1, found.x.shape[-1])


@pytest.mark.parametrize(("network", "name"), LAYERS)
def test_prototypes_and_inputs_find_each_other(network, name, model):
    layer, x = layer_of(model(network), name), inputs_of(network_config(network), 4)
    found = seen(model(network), x)[name]
    rows = points(found)
    per = len(rows) // len(x)
    distances, responses = brute(layer, rows)
    y = np.asarray(found.y, np.float64).reshape(len(rows), -1)
    assert np.abs(responses - y).max() <= 2e-3 * np.abs(y).max(), "the layer's own arithmetic"
    for by, values in (("distance", distances), ("response", responses)):
        got = compared(layer, rows, by)
        np.testing.assert_allclose(got, values, atol=1e-6 * np.abs(values).max())
        order = np.argsort(values if by == "distance" else -np.abs(values), -1)
        near = nearest_prototypes(layer, rows, 3, by)
        np.testing.assert_array_equal(near.units, order[:, :3])
        np.testing.assert_allclose(near.values, np.take_along_axis(values, order[:, :3], -1), rtol=1e-4)
        best = nearest_inputs(model(network), name, [x[:2], x[2:]], 3, by=by, length=4)
        wanted = np.sort(values.T if by == "distance" else -np.abs(values.T), -1)[:, :3]
        np.testing.assert_allclose(best.values, np.abs(wanted), rtol=1e-3)  # in batches float32 rounds otherwise
        at = best.rows * per + best.places
        assert all(len(set(each)) == 3 for each in at.tolist())
        np.testing.assert_allclose(np.abs(np.take_along_axis(values.T, at, -1)), best.values, rtol=1e-3)
        if x.ndim == 4:
            assert best.contexts is None
            continue
        for unit, rank in ((0, 0), (5, 2), (11, 1)):
            row, place = best.rows[unit, rank], best.places[unit, rank]
            ids = x[row, max(place - 3, 0) : place + 1]
            assert best.contexts[unit, rank].tolist() == [-1] * (4 - len(ids)) + ids.tolist()


def test_fewer_inputs_than_asked_for_are_all_there(model):
    x = inputs_of(network_config("aether_vit"), 2)
    found = nearest_inputs(model("aether_vit"), "head", [x[:1], x[1:]], 5)
    assert found.rows.shape == (5, 2) and (np.sort(found.rows, -1) == [0, 1]).all() and not found.places.any()


@pytest.mark.parametrize("spherical", [True, False])
def test_prototypes_that_duplicate_one_another(spherical, rng):
    layer = YatNMN(5, 40, spherical=spherical, rngs=nnx.Rngs(0))
    w = rng.normal(size=(40, 5)).astype(np.float32)
    w[31], w[17] = w[4], 2 * w[8]
    layer.set_prototypes(jnp.asarray(w))
    unit = w.astype(np.float64) / np.linalg.norm(w.astype(np.float64), axis=-1, keepdims=True)
    of = unit if spherical else w.astype(np.float64)
    gaps, cosines = np.linalg.norm(of[:, None] - of, axis=-1), unit @ unit.T
    for by, threshold, values, near in (
        ("distance", 0.5, gaps, gaps <= 0.5),
        ("cosine", 0.9, cosines, cosines >= 0.9),
    ):
        found = duplicates(layer, threshold, by=by)
        assert {(i, j) for i, j, _ in found} == {(i, j) for i, j in np.argwhere(near) if i < j} >= {(4, 31)}
        np.testing.assert_allclose([v for *_, v in found], [values[i, j] for i, j, _ in found], atol=1e-9)
        assert [v for *_, v in found] == sorted((v for *_, v in found), reverse=by == "cosine")
    assert ((8, 17) in {(i, j) for i, j, _ in duplicates(layer, 1e-6)}) == spherical


def test_units_that_never_respond():
    network, state = drawn_state(network_config("aether_plain"))
    kernel = state["blocks"]["mlp"]["hidden"]["kernel"]
    kernel[...] = kernel[...].at[1, :, jnp.array([3, 20])].multiply(1e-4)
    model, name = nnx.merge(network, state), "blocks.1.mlp.hidden"
    x = inputs_of(network_config("aether_plain"), 4)
    y = np.abs(np.asarray(seen(model, x)[name].y, np.float64).reshape(-1, 24))
    found = silent_units(model, name, [x[:2], x[2:]])
    assert found.units.tolist() == [3, 20]
    assert found.scale == pytest.approx(np.sqrt((y**2).mean()), rel=1e-4)
    np.testing.assert_allclose(found.largest, y.max(0), rtol=1e-2)
    between = np.sort(found.largest)[10:12].mean() / found.scale
    assert len(silent_units(model, name, [x[:2], x[2:]], between).units) == 11


@pytest.mark.parametrize("network", ["vit", "aether_vit", "resnet", "aether_resnet"])
def test_first_prototypes_as_pictures(network, model):
    made = model(network)
    if network.endswith("vit"):
        kernel, size = np.asarray(made.patches.kernel[...]), 4
    else:
        kernel, size = np.asarray(made.stem.conv.kernel[...] if network == "resnet" else made.stem.kernel[...]), 3
    pictures = first_layer(made)
    assert pictures.shape == (kernel.shape[-1], size, size, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
    for unit in (0, 5):
        for row, column, channel in ((0, 1, 2), (2, 0, 1)):
            value = flat[(row * size + column) * 3 + channel, unit]
            assert pictures[unit, row, column, channel] == pytest.approx(
                0.5 + value / (2 * np.abs(flat[:, unit]).max())
            )
    np.testing.assert_array_equal(as_images(np.zeros((8, 2)), (2, 4, 1)), np.full((2, 2, 4, 1), 0.5))


def test_wrong_arguments_are_one_sentence(model):
    layer, x = layer_of(model("aether"), "blocks.0.mlp.hidden"), np.ones((2, 16))
    for call, said in (
        (lambda: compared(layer, x, "cosine"), "by is 'cosine'; it takes one of distance, response"),
        (lambda: compared(layer, np.ones((2, 9))), r"The points are \(2, 9\) and the prototypes \(24, 16\)"),
        (lambda: duplicates(layer, 2.0, by="cosine"), "by is 'cosine' and threshold 2.0"),
        (lambda: nearest_inputs(model("aether"), "blocks.0.attention", [], 3), "There is no ⵟ layer"),
        (lambda: nearest_inputs(model("aether"), "blocks.0.mlp.hidden", [], 3), "There is no input"),
        (lambda: silent_units(model("aether"), "blocks.0.mlp.hidden", []), "There is no input"),
        (lambda: silent_units(model("gpt2"), "blocks.0.mlp.hidden", []), "none: the network has no ⵟ units"),
        (lambda: first_layer(model("aether")), "model.kind is aether, which reads text"),
        (lambda: as_images(np.ones((8, 2)), (3, 3, 1)), r"The kernel is \(8, 2\) and its pictures \(3, 3, 1\)"),
    ):
        with pytest.raises(InputError, match=said):
            call()
