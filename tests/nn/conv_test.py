"""Convolutional ⵟ layers: names and sizes are flax's and nmn's, values those of the dense layer on patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn.conv import (
    YatConv,
    YatConv1D,
    YatConv2D,
    YatConv3D,
    YatConvTranspose,
    YatConvTranspose1D,
    YatConvTranspose2D,
    YatConvTranspose3D,
)
from aether.nn.param import FrozenParam
from aether.nn.prototypes import KernelBank
from aether.nn.yat import YatNMN
from tools import reference


def plain(key, shape, dtype):
    """An initialiser without random numbers of JAX, which take seconds to compile."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) / 3, dtype)


def shape_of(kind, *args, **options):
    """The layer with shapes in the place of arrays: nothing to compile."""
    return nnx.eval_shape(lambda: kind(*args, **options, rngs=nnx.Rngs(0)))


def shapes(layer):
    return {path[-1]: v.get_value().shape for path, v in nnx.to_flat_state(nnx.state(layer))}


def forward(layer, x, **options):
    """Compiled as one function: much faster than op by op."""
    graph, state = nnx.split(layer)
    return jax.jit(lambda s, x: nnx.merge(graph, s)(x, **options))(state, x)


def draws(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_parameters_carry_the_names_and_layouts_of_the_field():
    options = dict(softplus_bias=True, bias_init=0.1, learnable_epsilon=True)
    conv = shape_of(YatConv, 6, 4, (3, 2), feature_group_count=2, **options)
    assert shapes(conv) == {"kernel": (3, 2, 3, 4), "bias": (4,), "alpha": (1,), "epsilon_param": (1,)}
    assert conv.kernel.get_metadata()["axes"] == (None, None, "embed", "mlp")
    assert conv.bias.get_metadata()["axes"] == ("mlp",)
    turned = shape_of(YatConvTranspose, 6, 4, (3,), transpose_kernel=True, **options)
    assert shapes(turned) == {"kernel": (3, 4, 6), "bias": (4,), "alpha": (1,), "epsilon_param": (1,)}
    assert turned.kernel.get_metadata()["axes"] == (None, "mlp", "embed")
    scalar = shape_of(YatConvTranspose, 6, 4, (3,), scalar_bias=True, use_alpha=False)
    assert shapes(scalar) == {"kernel": (3, 6, 4), "bias": (1,)}


@pytest.mark.parametrize(("ours", "flax"), [(YatConv, nnx.Conv), (YatConvTranspose, nnx.ConvTranspose)])
@pytest.mark.parametrize("kernel_size", [3, (3,), (3, 2)])
def test_kernel_sizes_and_leading_axes_mean_what_they_mean_in_flax(ours, flax, kernel_size):
    assert shapes(shape_of(ours, 4, 6, kernel_size))["kernel"] == shapes(shape_of(flax, 4, 6, kernel_size))["kernel"]
    for lead in ((), (2,), (2, 1, 3)):
        x = jax.ShapeDtypeStruct((*lead, 5, 4, 4) if kernel_size == (3, 2) else (*lead, 5, 4), jnp.float32)
        y, other = (
            jax.eval_shape(lambda x, kind=kind: kind(4, 6, kernel_size, strides=2, rngs=nnx.Rngs(0))(x), x)
            for kind in (ours, flax)
        )
        assert y.shape == other.shape


def test_leading_axes_are_batches(rng):
    x = draws(rng, 2, 1, 3, 5, 2)
    layer = YatConv1D(2, 3, 3, kernel_init=plain, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(forward(layer, x)[1, 0, 2], forward(layer, x[1, 0, 2]), rtol=1e-6)


def test_an_integer_is_the_size_of_each_axis_where_their_number_is_known():
    kinds = [YatConv1D, YatConv2D, YatConv3D, YatConvTranspose1D, YatConvTranspose2D, YatConvTranspose3D]
    for kind, n in zip(kinds, (1, 2, 3, 1, 2, 3), strict=True):
        assert shapes(shape_of(kind, 2, 5, 3))["kernel"] == (3,) * n + (2, 5)
    assert shapes(shape_of(YatConv2D, 2, 5, (3, 1)))["kernel"] == (3, 1, 2, 5)


def test_prototypes_start_near_unit_length():
    def lengths():
        options = dict(kernel_size=(4, 4), rngs=nnx.Rngs(0))
        layers = (
            YatConv(32, 64, feature_group_count=2, **options),
            YatConvTranspose(16, 64, **options),
            YatConvTranspose(16, 64, transpose_kernel=True, **options),
        )
        return [jnp.linalg.norm(layer.prototypes(None, "float32").reshape(-1, 64), axis=0) for layer in layers]

    for length in jax.jit(lengths)():
        assert abs(length.mean() - 1.0) < 0.05


@pytest.mark.parametrize("spherical", [False, True])
def test_is_the_dense_layer_on_patches(rng, spherical):
    options = dict(
        softplus_bias=True, bias_init=0.3, alpha_init=2.0, epsilon=0.2, spherical=spherical, kernel_init=plain
    )
    conv = YatConv(3, 4, (2, 2), padding="VALID", rngs=nnx.Rngs(0), **options)
    dense = YatNMN(12, 4, rngs=nnx.Rngs(1), **options)
    dense.kernel[...] = conv.kernel[...].reshape(12, 4)
    x = draws(rng, 2, 4, 5, 3)
    patches = jnp.stack([x[:, i : i + 3, j : j + 4] for i in (0, 1) for j in (0, 1)], -2).reshape(2, 3, 4, 12)
    np.testing.assert_allclose(forward(conv, x), forward(dense, patches), rtol=1e-4, atol=1e-6)


def test_a_transposed_layer_is_the_formula(rng):
    for turned in (False, True):
        layer = YatConvTranspose(
            3, 4, (3,), 2, epsilon=0.2, transpose_kernel=turned, kernel_init=plain, rngs=nnx.Rngs(0)
        )
        x, w = draws(rng, 2, 4, 3), layer.kernel[...]
        want = reference.yat_conv_transpose(x, w, strides=2, epsilon=0.2, transpose_kernel=turned)
        np.testing.assert_allclose(forward(layer, x), want, rtol=1e-4, atol=1e-6)


def test_causal_convolutions_do_not_see_the_future(rng):
    layer = YatConv1D(2, 3, 3, padding="CAUSAL", kernel_dilation=2, kernel_init=plain, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    slopes = jax.jit(jax.jacobian(lambda x: nnx.merge(graph, state)(x).sum(-1)))(draws(rng, 7, 2))
    seen = (np.abs(slopes).sum(-1) > 0).astype(int)  # (output, input)
    gap = np.arange(7)[:, None] - np.arange(7)
    np.testing.assert_array_equal(seen, (gap == 0) | (gap == 2) | (gap == 4))


FROM_DATA = [
    (YatConv2D, (3, 2), dict(padding="CIRCULAR", feature_group_count=2), "sample"),
    (YatConvTranspose1D, 3, dict(padding="VALID", transpose_kernel=True), "kmeans++"),
    (YatConvTranspose1D, 3, dict(), "sample"),
]


@pytest.mark.parametrize(("kind", "size", "options", "method"), FROM_DATA)
def test_prototypes_from_data_are_patches_of_it(rng, kind, size, options, method):
    """At its own patch a unit responds with α (‖p‖² + b)²/ε; nowhere else does it come near that."""
    x = draws(rng, 2, 6, 5, 4) if kind is YatConv2D else draws(rng, 2, 6, 4)

    def start(x):
        unit = dict(constant_bias=0.5, use_alpha=False, epsilon=1e-2, distance="exact", kernel_init=plain)
        layer = kind(4, 6, size, strides=2, **unit, **options, rngs=nnx.Rngs(0))
        layer.init_from_data(x, jax.random.key(0), method=method)
        counts = [layer.ill_conditioned(x, threshold) for threshold in (50.0, 1e9)]
        return layer.prototypes(None, "float32"), layer(x), counts

    prototypes, y, counts = jax.jit(start)(x)
    prototypes = np.asarray(prototypes).reshape(-1, 6)
    np.testing.assert_allclose(y.reshape(-1, 6).max(0), ((prototypes**2).sum(0) + 0.5) ** 2 / 1e-2, rtol=1e-4)
    assert len({tuple(column) for column in prototypes.T}) == 6
    assert counts[0] >= 6 and counts[1] == 0


def test_options_of_prototypes_reach_the_kernel(rng):
    def start(x):
        options = dict(kernel_size=(2,), kernel_init=plain, rngs=nnx.Rngs(0))
        unit = [YatConvTranspose(3, 4, weight_normalized=True, transpose_kernel=t, **options) for t in (False, True)]
        dropped = YatConv(3, 4, drop_rate=0.5, **options)
        bank = KernelBank((2, 3, 8), kernel_init=plain, rngs=nnx.Rngs(0))
        shared = YatConv(3, 4, (2,), kernel_bank=bank, rngs=nnx.Rngs(0))
        return (
            [layer.prototypes(None, "float32") for layer in unit],
            (dropped(x, key=jax.random.key(0)), dropped(x)),
            YatConv(3, 4, positive_init=True, **options).kernel[...],
            (shared.prototypes(None, "float32"), bank.kernel[...]),
        )

    unit, (dropped, whole), positive, (shared, bank) = jax.jit(start)(draws(rng, 2, 5, 3))
    for kernel in unit:
        np.testing.assert_allclose(np.linalg.norm(kernel.reshape(-1, 4), axis=0), 1.0, rtol=1e-5)
    assert np.abs(dropped - whole).max() > 1e-3
    assert (positive >= 0).all()
    np.testing.assert_array_equal(shared, bank[..., :4])
    assert isinstance(shape_of(YatConv, 3, 4, (2,), freeze_kernel=True).kernel, FrozenParam)


def test_every_parameter_learns_and_the_dtype_is_the_one_asked_for(rng):
    kinds = dict(conv=YatConv2D, transposed=YatConvTranspose2D)
    options = dict(softplus_bias=True, bias_init=0.1, learnable_epsilon=True, dtype="bfloat16", kernel_init=plain)
    split = {k: nnx.split(kind(3, 4, 2, **options, rngs=nnx.Rngs(0))) for k, kind in kinds.items()}
    x = draws(rng, 2, 3, 3, 3)

    def total(params):
        ys = [nnx.merge(split[k][0], params[k])(x) for k in kinds]
        assert all(y.dtype == "bfloat16" for y in ys)
        return sum(y.astype(jnp.float32).sum() for y in ys)

    grads = jax.jit(jax.grad(total))({k: state for k, (_, state) in split.items()})
    assert len(jax.tree.leaves(grads)) == 8
    assert all((g != 0).all() and g.dtype == "float32" for g in jax.tree.leaves(grads))


def bank_of(*shape):
    return KernelBank(shape, kernel_init=plain, rngs=nnx.Rngs(0))


OPTIONS = [
    (YatConv, dict(feature_group_count=2, in_features=3), "feature_group_count is 2, in_features 3"),
    (YatConv, dict(feature_group_count=4, in_features=4), "out_features 6; it must divide both"),
    (YatConv, dict(feature_group_count=0), "feature_group_count is 0"),
    (YatConv, dict(kernel_size=(3, 0)), r"kernel_size is \(3, 0\)"),
    (YatConv2D, dict(kernel_size=(3, 3, 3)), "each of the 2 spatial axes"),
    (YatConv, dict(kernel_size=()), "kernel_size is"),
    (YatConv1D, dict(strides=(1, 2)), r"strides is \(1, 2\)"),
    (YatConv1D, dict(strides=-2), "strides is -2"),
    (YatConv2D, dict(kernel_dilation=(1, 2, 3)), "kernel_dilation is"),
    (YatConv2D, dict(padding="CAUSAL"), "'CAUSAL' with 2 spatial axes"),
    (YatConv2D, dict(input_dilation=2), "'SAME' with an input_dilation"),
    (YatConvTranspose2D, dict(padding="CAUSAL"), "'CAUSAL'; it must be one of SAME, VALID, CIRCULAR"),
    (YatConv, dict(epsilon=-1.0), "epsilon is -1.0"),
    (YatConv, dict(distance="near"), "distance is 'near'"),
    (YatConv1D, dict(kernel_bank=bank_of(2, 4, 8)), r"kernel_bank is \(2, 4, 8\)"),
    (
        YatConvTranspose1D,
        dict(transpose_kernel=True, kernel_bank=bank_of(3, 4, 6)),
        "transpose_kernel is True with a kernel_bank",
    ),
]


@pytest.mark.parametrize(("kind", "options", "message"), OPTIONS)
def test_options_that_do_not_fit_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        shape_of(kind, **(dict(in_features=4, out_features=6, kernel_size=3) | options))


def test_inputs_that_do_not_fit_are_refused():
    layer = YatConv2D(4, 6, 3, padding="REFLECT", kernel_init=plain, rngs=nnx.Rngs(0))
    for x, message in [
        (jnp.ones((5, 5, 3)), "in_features is 4"),
        (jnp.ones((5, 4)), r"x is \(5, 4\) and kernel_size \(3, 3\); x must have 2 spatial axes"),
        (jnp.ones((1, 5, 4)), "larger than its padding"),
        (jnp.ones((5, 5, 4), int), "cast it to a floating dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x)


def test_an_empty_batch_gives_an_empty_batch():
    layer = YatConv(4, 6, np.int64(3), feature_group_count=2, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((0, 8, 4))).shape == (0, 8, 6)
