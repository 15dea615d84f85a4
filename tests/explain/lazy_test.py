"""Lazy evaluation: what is evaluated, the bound against the truth in float64, the copy of a network, cells by faiss."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.lazy import Cells, LazyMLP, bounds, errors, lazily, nearest, readout, scores
from aether.nn import YatMLP
from aether.testing import drawn_state, inputs_of, network_config
from tools import reference

FORMS = [
    dict(spherical=False, epsilon=0.1, softplus_bias=True, bias_init=0.2),
    dict(spherical=True, epsilon=0.1),
    dict(spherical=False, epsilon=1e-3, distance="exact", constant_bias=-0.5),
    dict(spherical=True, epsilon=0.1, distance="exact", weight_normalized=True),
]


def made(rng, d=6, n=40, e=5, **options):
    """A block whose kernel, readout, α and b are drawn; some prototypes lie at 0 or on the first input."""
    mlp = YatMLP(d, n, e, rngs=nnx.Rngs(0), **options)
    nnx.update(mlp, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, jnp.float32), nnx.state(mlp)))
    x = rng.normal(size=(7, d)).astype(np.float32) / 2
    x[3] = 0
    mlp.hidden.kernel[...] = mlp.hidden.kernel[...].at[:, 0].set(x[0]).at[:, 1].set(0)
    return mlp, jnp.asarray(x)


def truth(mlp, x):
    """The squared distances, responses and parts of the map (m, n, e) in float64."""
    hidden = mlp.hidden
    w, options = np.asarray(hidden.kernel[...], np.float64), {k: np.asarray(v) for k, v in hidden.unit().items()}
    options = {k: np.float64(options[k]) for k in ("bias", "alpha", "epsilon")}
    shape = dict(spherical=hidden.spherical, weight_normalized=hidden.weight_normalized)
    y = reference.yat(x, w, **options, **shape)
    size = reference.condition(x, w, epsilon=1e-9, **shape)
    rows = reference.unit(x) if hidden.spherical else np.asarray(x, np.float64)
    columns = reference.unit(w, 0) if hidden.spherical or hidden.weight_normalized else w
    s = np.sum(rows**2, -1)[:, None] + np.sum(columns**2, 0)
    d = np.where(s > 0, s / np.where(size > 0, size, 1) - 1e-9, 0)
    if hidden.spherical:
        d = 2 - 2 * rows @ columns
    return d, y, y[:, :, None] * np.asarray(mlp.out.kernel[...], np.float64)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("k", [1, 7])
def test_the_k_nearest_are_evaluated_and_no_other(rng, options, k):
    mlp, x = made(rng, **options)
    d, y, parts = truth(mlp, x)
    found = nearest(mlp.hidden, x, k)
    index = np.asarray(found.chosen)
    np.testing.assert_allclose(
        np.sort(np.take_along_axis(d, index, -1)), np.sort(d, -1)[:, :k], atol=1e-5 * (1 + d.max())
    )
    np.testing.assert_allclose(
        found.y, np.take_along_axis(y, index, -1), rtol=1e-3 if options["epsilon"] < 0.1 else 1e-4
    )
    want = sum(parts[np.arange(7), index[:, i]] for i in range(k))
    np.testing.assert_allclose(LazyMLP(mlp, k)(x) - mlp.out.bias[...], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("options", FORMS)
def test_all_units_are_the_dense_layer_bit_by_bit(rng, options):
    mlp, x = made(rng, **options)
    assert np.asarray(LazyMLP(mlp, 40)(x[None])).tobytes() == np.asarray(mlp(x[None])).tobytes()
    np.testing.assert_allclose(
        readout(nearest(mlp.hidden, x, 40), mlp.out.kernel[...]), mlp(x) - mlp.out.bias[...], rtol=1e-4, atol=1e-4
    )


def left_out(index, n):
    mask = np.ones((len(index), n + 1), bool)
    np.put_along_axis(mask, np.asarray(index), False, -1)
    return mask[:, :n]


def check_bounds(mlp, x, found):
    """No bound is below the truth; returns the shares of the bounds that are used."""
    _, y, parts = truth(mlp, x)
    rest = left_out(found.chosen, y.shape[1])
    got = bounds(mlp.hidden, x, found, mlp.out.kernel[...])
    missing = np.where(rest[..., None], parts, 0).sum(1)
    assert np.all(np.abs(y)[rest] <= np.asarray(got.units)[rest]) and np.all(np.asarray(got.units)[~rest] == 0)
    assert np.all(np.linalg.norm(missing, axis=-1) <= np.asarray(got.length))
    assert np.all(np.abs(missing) <= np.asarray(got.outputs))
    return np.max(np.abs(y)[rest] / np.asarray(got.units)[rest]) if rest.any() else 1.0


@pytest.mark.parametrize("options", FORMS)
def test_the_error_never_exceeds_its_bound(options):
    used = []
    for seed in range(12):
        mlp, x = made(np.random.default_rng(seed), d=3, **options)
        for k in (1, 20):
            used.append(check_bounds(mlp, x, nearest(mlp.hidden, x, k)))
    assert 0.95 < max(used) <= 1, "the bound is reached by a unit at the last distance"


def test_a_unit_may_respond_most_at_the_far_end_and_the_bound_knows(rng):
    """In one dimension, with b < 0, a prototype opposite to x responds more than any could at D_k = 1."""
    mlp = YatMLP(1, 2, 1, rngs=nnx.Rngs(0), constant_bias=-1.0, epsilon=0.5)
    mlp.hidden.kernel[...] = jnp.array([[0.0, -1.0]])
    x = jnp.array([[1.0]])
    got = bounds(mlp.hidden, x, nearest(mlp.hidden, x, 1), mlp.out.kernel[...]).units
    np.testing.assert_allclose(got, [[0, 4 / 4.5]], rtol=1e-5)


def test_the_errors_fall_with_k_below_their_bounds_to_nothing(rng):
    mlp, x = made(rng, **FORMS[0])
    rows = errors(mlp, x, [1, 10, 39, 40])
    assert [row["share"] for row in rows] == [0.025, 0.25, 0.975, 1.0]
    assert all(row["error"] <= row["bound"] for row in rows) and rows[-1]["error"] == rows[-1]["bound"] == 0
    _, _, parts = truth(mlp, x)
    rest = left_out(nearest(mlp.hidden, x, 10).chosen, 40)
    want = np.linalg.norm(np.where(rest[..., None], parts, 0).sum(1)) / np.linalg.norm(parts.sum(1))
    assert rows[1]["error"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", ["aether", "aether_vit"])
def test_a_network_whose_blocks_are_lazy(name):
    config = network_config(name)
    model, x = nnx.merge(*drawn_state(config)), jnp.asarray(inputs_of(config))

    def score(model):
        y = jax.jit(lambda x: model(x))(x)
        return dict(mean=float(jnp.mean(jnp.abs(y[0] if isinstance(y, tuple) else y))))

    rows = scores(model, [1.0, 0.5, 0.05], score)
    assert [row["share"] for row in rows] == [1.0, 0.5, 0.05]
    means = [row["mean"] for row in rows]
    assert means[0] == score(model)["mean"] and len(set(means)) == 3
    assert isinstance(model.blocks.mlp, YatMLP), "the network itself stays as it is"


def test_what_cannot_be_lazy_is_refused(rng, monkeypatch):
    config = network_config("gpt2")
    with pytest.raises(InputError, match="no ⵟ-MLP"):
        lazily(nnx.merge(*drawn_state(config)), 0.5)
    with pytest.raises(InputError, match="share of units to evaluate is 0"):
        lazily(nnx.merge(*drawn_state(network_config("aether"))), 0)
    mlp, _ = made(rng)
    with pytest.raises(InputError, match="k is 41 and the layer has 40 units; take 1 to 40"):
        LazyMLP(mlp, 41)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'aether\[faiss\]'"):
        Cells(mlp.hidden)


@pytest.mark.parametrize("options", FORMS)
def test_cells_find_the_nearest_of_those_they_look_at_and_keep_the_bound(options):
    pytest.importorskip("faiss", reason="faiss is an extra: pip install 'aether[faiss]'")
    recall = []
    for seed in range(3):
        mlp, x = made(np.random.default_rng(seed), d=3, n=200, **options)
        d, y, _ = truth(mlp, x)
        for probes in (1, 30):
            found = Cells(mlp.hidden, cells=30, probes=probes).nearest(x, 20)
            index = np.asarray(found.chosen)
            there = index < 200
            assert np.all(np.asarray(found.y)[~there] == 0)
            got, want = np.asarray(found.y)[there], np.take_along_axis(y, np.minimum(index, 199), -1)[there]
            np.testing.assert_allclose(got, want, rtol=2e-3)
            check_bounds(mlp, x, found)
            best = np.argsort(d, -1)[:, :20]
            shares = [len(set(a) & set(b)) / 20 for a, b in zip(index, best, strict=True)]
            recall.append(np.mean(np.delete(shares, 3)))  # to a zero vector all directions are equally near
    assert min(recall[1::2]) > 0.99, "with all cells the search is exact"
    assert max(recall[0::2]) < 0.9


def test_cells_are_refused_where_they_cannot_be(rng):
    pytest.importorskip("faiss", reason="faiss is an extra: pip install 'aether[faiss]'")
    mlp, _ = made(rng)
    with pytest.raises(InputError, match="5 probes of 4 cells of 40 prototypes"):
        Cells(mlp.hidden, cells=4, probes=5)
