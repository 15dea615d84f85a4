"""Capacity: norms by the definition of an RKHS, spectra, the bound, and the decay of the norms in training."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.capacity import capacities, capacity, effective_rank, gram, penalty, rademacher
from aether.explain.capacity import squared_norms as norms_of
from aether.explain.layers import layers_of
from aether.explain.points import centres_of
from aether.models import describe_model
from aether.nn import YatConv, YatConv2D, YatNMN
from aether.nn.param import stack
from aether.testing import NETWORKS, drawn_state, inputs_of, network_config
from tools import reference


def kernel(x, w, bias, epsilon, spherical=False):
    """k_b of rows, from the formula."""
    return reference.yat(x, w.T, bias=bias, epsilon=epsilon, spherical=spherical)


def drawn(rng, module):
    """The module with all parameters from N(0, 1/4)."""
    nnx.update(
        module, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, jnp.float32), nnx.state(module))
    )
    return module


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(softplus_bias=True, bias_init=0.3), dict(constant_bias=0.7)])
def test_norms_bound_the_units_in_the_space_of_beta_and_are_reached(rng, spherical, options):
    """‖f‖ ≤ B if and only if B² k − f ⊗ f is positive semi-definite on all finite sets."""
    layer = drawn(rng, YatNMN(3, 5, spherical=spherical, epsilon=0.2, **options, rngs=nnx.Rngs(0)))
    if not options:  # a unit that is zero at its own centre is not zero
        layer.bias[...] = layer.bias[...].at[2].set(-np.sum(centres_of(layer)[2] ** 2))
    bias = np.broadcast_to(np.asarray(layer.unit()["bias"], np.float64), 5)
    points = np.concatenate([rng.normal(size=(40, 3)), centres_of(layer)])
    k = kernel(points, points, np.abs(bias).max(), 0.2, spherical)
    alpha, w = np.float64(layer.alpha[0]), np.asarray(layer.kernel[...], np.float64)
    units = alpha * reference.yat(points, w, bias=bias, epsilon=0.2, spherical=spherical)
    norms = np.asarray(norms_of(layer), np.float64)
    for j, (f, square) in enumerate(zip(units.T, norms, strict=True)):
        least = np.linalg.eigvalsh(square * (1 + 1e-5) * k - np.outer(f, f)).min()
        assert least > -1e-9 * square * np.trace(k)
        below = np.linalg.eigvalsh(0.98 * square * k - np.outer(f, f)).min()
        reached = bias[j] == np.abs(bias).max()
        assert not reached or below < -1e-6 * square, "a smaller number would do"


def test_a_zero_prototype_has_no_direction_and_a_norm_all_the_same(rng):
    layer = drawn(rng, YatNMN(3, 4, spherical=True, epsilon=0.2, constant_bias=0.5, rngs=nnx.Rngs(0)))
    layer.kernel[...] = layer.kernel[...].at[:, 1].set(0)
    w = np.asarray(layer.kernel[...], np.float64).T
    want = np.float64(layer.alpha[0]) ** 2 * np.diag(kernel(w, w, 0.5, 0.2, True))
    np.testing.assert_allclose(norms_of(layer), want, rtol=1e-5)
    np.testing.assert_allclose(np.diag(gram(layer)), np.diag(kernel(w, w, 0.5, 0.2, True)), rtol=1e-9)


@pytest.mark.parametrize("spherical", [False, True])
def test_convolutions_are_kernels_of_patches(rng, spherical):
    layer = drawn(rng, YatConv2D(2, 4, 3, spherical=spherical, epsilon=0.1, constant_bias=0.3, rngs=nnx.Rngs(0)))
    w = np.asarray(layer.kernel[...], np.float64).reshape(18, 4).T
    want = kernel(w, w, 0.3, 0.1, spherical)
    np.testing.assert_allclose(gram(layer), want, rtol=1e-9)
    np.testing.assert_allclose(norms_of(layer), np.float64(layer.alpha[0]) ** 2 * np.diag(want), rtol=1e-5)
    x = rng.normal(size=(2, 5, 5, 2)).astype(np.float32)
    padded = np.pad(x.astype(np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)])
    patches = np.stack([padded[:, i : i + 3, j : j + 3].reshape(2, -1) for i in range(5) for j in range(5)], 1)
    patches = patches.reshape(50, 18)
    trace = sum(kernel(p[None], p[None], 0.3, 0.1, spherical).item() for p in patches)
    bound = rademacher(layer, x, radius=2.0)
    assert (bound.samples, bound.radius) == (50, 2.0) and bound.trace == pytest.approx(trace, rel=1e-5)
    assert bound.value == pytest.approx(2.0 * trace**0.5 / 50, rel=1e-5)
    assert any("patches" in line for line in bound.assumptions)
    grouped = YatConv2D(4, 4, 3, feature_group_count=2, rngs=nnx.Rngs(0))
    for use in (gram, lambda layer: rademacher(layer, rng.normal(size=(1, 5, 5, 4)).astype(np.float32))):
        with pytest.raises(InputError, match="2 groups"):
            use(grouped)


@pytest.mark.parametrize("spherical", [False, True])
def test_the_bound_is_not_below_the_complexity_of_the_ball(rng, spherical):
    """The supremum over the ball is B √(σᵀKσ)/n exactly; here its mean over all signs."""
    layer = drawn(rng, YatNMN(3, 5, spherical=spherical, epsilon=0.2, rngs=nnx.Rngs(0)))
    x = rng.normal(size=(2, 4, 3)).astype(np.float32)
    rows = x.reshape(8, 3).astype(np.float64)
    beta = np.abs(np.asarray(layer.bias[...], np.float64)).max()
    k = kernel(rows, rows, beta, 0.2, spherical)
    signs = 2.0 * (np.arange(2**8)[:, None] >> np.arange(8) & 1) - 1
    bound = rademacher(layer, x)
    complexity = np.mean(np.sqrt(np.einsum("si,ij,sj->s", signs, k, signs))) * bound.radius / 8
    assert bound.radius == pytest.approx(float(np.max(norms_of(layer))) ** 0.5, rel=1e-6)
    assert complexity <= bound.value < 1.5 * complexity
    assert "read off" in " ".join(bound.assumptions)


def test_effective_rank_counts_the_directions():
    assert effective_rank(np.array([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(np.array([5.0, 0.0, -1e-17])) == pytest.approx(1)
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 27**0.25)


def test_one_layer_with_both_conventions_and_what_is_exact(rng):
    shared = drawn(rng, YatNMN(3, 4, epsilon=0.2, constant_bias=0.4, rngs=nnx.Rngs(0)))
    found = capacity(shared)
    np.testing.assert_allclose(found.norms, found.papers * abs(float(shared.alpha[0])), rtol=1e-6)
    np.testing.assert_allclose(np.sum(found.eigenvalues), np.trace(gram(shared)))
    assert found.exact and found.bound is None and found.beta == pytest.approx(0.4)
    summary = found.summary()
    assert summary["units"] == 4 and 1 <= summary["effective_rank"] <= 4 and 0.25 <= summary["top_share"] <= 1
    assert summary["total"] == pytest.approx(4 * summary["mean"])
    few = capacity(shared, limit=2)
    assert few.summary()["centres"] == len(few.eigenvalues) == 2 and len(few.norms) == 4
    np.testing.assert_allclose(few.eigenvalues.sum(), gram(shared)[[0, 3], [0, 3]].sum())
    assert not capacity(drawn(rng, YatNMN(3, 4, rngs=nnx.Rngs(0)))).exact


@pytest.mark.parametrize("name", ["aether_plain", "aether_resnet_head"])
def test_by_layer_of_a_network(name):
    config = network_config(name)
    model = nnx.merge(*drawn_state(config))
    found = capacities(model, inputs_of(config))
    named = {name for name in layers_of(model) if not name.endswith("attention")}
    assert set(found) == named and all(c.bound.value > 0 for c in found.values())
    mean = sum(c.norms.mean() for c in found.values())
    assert float(penalty(model)) == pytest.approx(mean, rel=1e-5), "stacked layers count each"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_config_knows_which_networks_have_prototypes(name):
    config = network_config(name)
    graph, *shapes = describe_model(config)
    model = nnx.merge(graph, *shapes)
    assert config.model.prototypes == any(isinstance(m, YatNMN | YatConv) for _, m in nnx.iter_modules(model))
    if not config.model.prototypes:
        with pytest.raises(InputError, match=re.escape("no ⵟ units with prototypes")):
            capacities(nnx.merge(*drawn_state(config)))


def test_layers_that_are_stacked_have_each_their_norms(rng):
    def make(rngs):
        return YatNMN(3, 4, epsilon=0.2, learnable_epsilon=True, softplus_bias=True, bias_init=0.2, rngs=rngs)

    both = drawn(rng, stack(make, 2, nnx.Rngs(0)))
    graph, state = nnx.split(both)
    each = [norms_of(nnx.merge(graph, jax.tree.map(lambda a, k=k: a[k], state))) for k in (0, 1)]
    np.testing.assert_allclose(norms_of(both), np.stack(each), rtol=1e-6)
