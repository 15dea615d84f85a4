"""Prototypes: initial scale, data, banks, frozen kernels and DropConnect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn import KernelBank, YatNMN, draw_prototypes
from aether.nn.param import FrozenParam


def make(out=4, **options):
    return YatNMN(6, out, **options, rngs=nnx.Rngs(0))


def test_positive_init_starts_without_negative_entries():
    np.testing.assert_array_equal(make(positive_init=True).kernel[...], np.abs(make().kernel[...]))


def test_a_frozen_kernel_is_saved_but_is_no_parameter(rng):
    layer = make(freeze_kernel=True)
    assert isinstance(layer.kernel, FrozenParam)
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))} == {"bias", "alpha"}
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer))} == {"kernel", "bias", "alpha"}
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    np.testing.assert_array_equal(layer(x), make()(x))


def test_layers_share_a_bank_that_is_passed_to_them(rng):
    bank = KernelBank((6, 5), rngs=nnx.Rngs(1))
    layers = [make(out, kernel_bank=bank, epsilon=0.3) for out in (5, 3)]
    assert all({path[-1] for path, _ in nnx.to_flat_state(nnx.state(m, nnx.Param))} >= {"kernel"} for m in layers)
    x = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    wide, narrow = (layer(x) for layer in layers)
    np.testing.assert_array_equal(narrow, wide[:, :3])
    assert layers[0].kernel_bank is layers[1].kernel_bank
    bank.kernel[...] = jnp.zeros((6, 5))
    assert (layers[0](x) == 0).all() and (layers[1](x) == 0).all()  # b starts at 0


def test_the_gradient_of_a_bank_is_the_sum_over_its_layers(rng):
    bank = KernelBank((6, 5), rngs=nnx.Rngs(1))
    layers = nnx.List([make(out, kernel_bank=bank, epsilon=0.3) for out in (5, 3)])
    x = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    graph, params = nnx.split(layers)
    assert sum(v[...].shape == (6, 5) for _, v in nnx.to_flat_state(params)) == 1

    @jax.jit
    def gradients(params, kernel):
        def one(kernel, out):
            alone = make(out, epsilon=0.3)
            alone.kernel[...] = kernel[:, :out]
            return alone(x).sum()

        whole = jax.grad(lambda p: sum(layer(x).sum() for layer in nnx.merge(graph, p)))(params)
        return whole, [jax.grad(one)(kernel, out) for out in (5, 3)]

    whole, parts = gradients(params, bank.kernel[...])
    found = next(v[...] for _, v in nnx.to_flat_state(whole) if v[...].shape == (6, 5))
    np.testing.assert_allclose(found, parts[0] + parts[1], rtol=1e-5, atol=1e-6)


def test_a_bank_that_does_not_fit_is_refused():
    for shape in [(6, 3), (5, 4)]:
        with pytest.raises(ValueError, match=rf"kernel_bank is \({shape[0]}, {shape[1]}\), the layer needs \(6, 4\)"):
            make(kernel_bank=KernelBank(shape, rngs=nnx.Rngs(0)))


def test_dropconnect_masks_entries_only_with_a_key():
    layer = YatNMN(50, 40, drop_rate=0.3, rngs=nnx.Rngs(0))
    whole, once, again = (layer.prototypes(key, "float32") for key in (None, jax.random.key(0), jax.random.key(0)))
    np.testing.assert_array_equal(whole, layer.kernel[...])
    np.testing.assert_array_equal(once, again)
    dropped = np.asarray(once == 0)
    assert 0.25 < dropped.mean() < 0.35
    np.testing.assert_allclose(np.asarray(once)[~dropped], np.asarray(whole)[~dropped] / 0.7, rtol=1e-6)
    assert (np.asarray(layer.prototypes(jax.random.key(1), "float32") == 0) != dropped).any()


def test_normalized_prototypes_are_unit_columns_after_the_mask():
    layer = YatNMN(50, 40, drop_rate=0.3, weight_normalized=True, rngs=nnx.Rngs(0))
    for key in (None, jax.random.key(0)):
        np.testing.assert_allclose(jnp.linalg.norm(layer.prototypes(key, "float32"), axis=0), 1.0, rtol=1e-5)


@pytest.mark.parametrize("method", ["sample", "kmeans++"])
def test_drawn_prototypes_are_different_rows_of_the_batch(rng, method):
    x = rng.normal(size=(4, 5, 3)).astype(np.float32)
    drawn = np.asarray(draw_prototypes(jnp.asarray(x), 20, jax.random.key(0), method=method))
    rows = {tuple(row) for row in x.reshape(-1, 3)}
    assert {tuple(row) for row in drawn} == rows  # 20 of 20, none twice
    other = draw_prototypes(jnp.asarray(x), 6, jax.random.key(1), method=method)
    assert {tuple(row) for row in np.asarray(other)} < rows and len({tuple(row) for row in np.asarray(other)}) == 6


def test_kmeans_plus_plus_finds_small_clusters():
    """300 points here and 3 far away in three places: sampling misses them, seeding by distance does not."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    x = np.concatenate([0.1 * rng.normal(size=(300, 2)), centres[1:]])
    draw = jax.jit(lambda key: draw_prototypes(jnp.asarray(x, jnp.float32), 4, key))
    found = [((np.asarray(draw(jax.random.key(i)))[:, None] - centres) ** 2).sum(-1).argmin(1) for i in range(5)]
    assert all(sorted(f) == [0, 1, 2, 3] for f in found)


def test_equal_rows_are_drawn_only_as_a_last_resort():
    x = jnp.asarray([[1.0, 0.0]] * 8 + [[0.0, 1.0]], jnp.float32)
    drawn = np.asarray(draw_prototypes(x, 3, jax.random.key(3)))
    assert {tuple(row) for row in drawn[:2]} == {(1.0, 0.0), (0.0, 1.0)} and np.isfinite(drawn).all()


def test_noise_is_in_units_of_the_data(rng):
    x = jnp.asarray(100.0 * rng.normal(size=(500, 4)), jnp.float32)
    key = jax.random.key(0)
    moved = draw_prototypes(x, 400, key, method="sample", noise=0.1) - draw_prototypes(x, 400, key, method="sample")
    assert 9.0 < float(moved.std()) < 11.0


def test_a_layer_starts_from_data(rng):
    x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    bank = KernelBank((6, 5), rngs=nnx.Rngs(1))
    last = bank.kernel[...][:, 4:]
    for layer in (make(epsilon=0.5), make(kernel_bank=bank, epsilon=0.5)):
        layer.init_from_data(x, jax.random.key(0))
        drawn = layer.raw_kernel().T
        assert all((row == x).all(-1).any() for row in drawn)
        np.testing.assert_allclose(jnp.diag(layer(drawn)), (drawn**2).sum(-1) ** 2 / 0.5, rtol=1e-4)
    np.testing.assert_array_equal(bank.kernel[...][:, 4:], last)


def test_bad_arguments_are_named(rng):
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    for wrong, message in [
        (lambda: make(drop_rate=1.0), "drop_rate is 1.0; it must be in"),
        (lambda: draw_prototypes(x, 2, jax.random.key(0), noise=-1.0), "noise is -1.0"),
        (
            lambda: make(kernel_bank=KernelBank((6, 5), rngs=nnx.Rngs(0)), freeze_kernel=True),
            "kernel_bank is given with kernel_init, positive_init or freeze_kernel",
        ),
        (lambda: make().init_from_data(x, jax.random.key(0)), "x has 3 rows and 4 prototypes"),
        (lambda: draw_prototypes(x, 2, jax.random.key(0), method="best"), "method is 'best'; it must be one of sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
