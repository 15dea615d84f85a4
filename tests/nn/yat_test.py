"""The dense ⵟ layer: its parameters, their starting values, and its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn import YatNMN


def make(**kwargs):
    return YatNMN(6, 4, **(dict(softplus_bias=True, bias_init=0.1, learnable_epsilon=True) | kwargs), rngs=nnx.Rngs(0))


def test_parameters_carry_the_names_and_layouts_of_the_field():
    shapes = {path[-1]: v[...].shape for path, v in nnx.to_flat_state(nnx.state(make()))}
    assert shapes == {"kernel": (6, 4), "bias": (4,), "alpha": (1,), "epsilon_param": (1,)}
    axes = {path[-1]: v.get_metadata()["axes"] for path, v in nnx.to_flat_state(nnx.state(make()))}
    assert axes == {"kernel": ("embed", "mlp"), "bias": ("mlp",), "alpha": (None,), "epsilon_param": (None,)}


def test_bias_alpha_and_epsilon_start_as_asked():
    unit = make(bias_init=0.7, alpha_init=16.0, epsilon=0.3).unit()
    for name, value in dict(bias=0.7, alpha=16.0, epsilon=0.3).items():
        np.testing.assert_allclose(unit[name], value, rtol=1e-5)


def test_prototypes_start_near_unit_length():
    layer = YatNMN(256, 64, rngs=nnx.Rngs(0))
    assert abs(float(jnp.linalg.norm(layer.kernel[...], axis=0).mean()) - 1.0) < 0.05
    assert (
        abs(
            float(YatNMN(256, 64, kernel_init=nnx.initializers.normal(0.02), rngs=nnx.Rngs(0)).kernel[...].std()) - 0.02
        )
        < 1e-3
    )


@pytest.mark.parametrize("spherical", [False, True])
def test_is_the_formula(rng, spherical):
    layer = make(bias_init=0.7, alpha_init=2.0, epsilon=0.3, spherical=spherical)
    x, w = rng.normal(size=(2, 3, 6)), np.asarray(layer.kernel[...], float)
    y = layer(jnp.asarray(x, jnp.float32))
    if spherical:
        x, w = x / np.linalg.norm(x, axis=-1, keepdims=True), w / np.linalg.norm(w, axis=0)
    gap = ((x[..., None] - w) ** 2).sum(-2)
    np.testing.assert_allclose(y, 2.0 * (x @ w + 0.7) ** 2 / (gap + 0.3), rtol=1e-4)


def test_computes_in_the_dtype_asked_for(rng):
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    half = make(dtype="bfloat16")
    assert half(x).dtype == "bfloat16" and half.kernel[...].dtype == "float32"
    np.testing.assert_allclose(half(x), make()(x), rtol=0.1, atol=1e-2)


def test_every_parameter_learns(rng):
    graph, params = nnx.split(make())
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(x).sum()))(params)
    assert all((g != 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "names", "unit"),
    [
        (dict(), {"kernel", "bias", "alpha"}, dict(bias=0.0, alpha=1.0, epsilon=1e-5, nonnegative_bias=False)),
        (dict(use_bias=False, use_alpha=False), {"kernel"}, dict(bias=0.0, alpha=1.0, nonnegative_bias=True)),
        (dict(constant_bias=0.5), {"kernel", "alpha"}, dict(bias=0.5, nonnegative_bias=True)),
        (dict(constant_bias=-0.5), {"kernel", "alpha"}, dict(bias=-0.5, nonnegative_bias=False)),
        (dict(constant_alpha=True), {"kernel", "bias"}, dict(alpha=2.0**0.5)),
        (dict(constant_alpha=3.0), {"kernel", "bias"}, dict(alpha=3.0)),
        (dict(constant_alpha=0.0), {"kernel", "bias"}, dict(alpha=0.0)),
        (dict(constant_alpha=False), {"kernel", "bias", "alpha"}, dict(alpha=1.0)),
        (dict(softplus_bias=True), {"kernel", "bias", "alpha"}, dict(bias=np.log(2.0), nonnegative_bias=True)),
        (dict(scalar_bias=True, bias_init=0.3), {"kernel", "bias", "alpha"}, dict(bias=0.3)),
        (
            dict(learnable_epsilon=True, epsilon=1e-3),
            {"kernel", "bias", "alpha", "epsilon_param"},
            dict(epsilon=1e-3),
        ),
        (dict(bias_init=nnx.initializers.ones, alpha_init=nnx.initializers.ones), None, dict(bias=1.0, alpha=1.0)),
    ],
)
def test_options_are_nmns(options, names, unit):
    layer = YatNMN(6, 4, **options, rngs=nnx.Rngs(0))
    found = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert names is None or found == names
    for name, value in unit.items():
        np.testing.assert_allclose(layer.unit()[name], value, rtol=1e-5, err_msg=name)
    if options.get("scalar_bias"):
        assert layer.bias[...].shape == (1,)


def test_a_vector_is_a_batch_of_one(rng):
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    np.testing.assert_allclose(make()(x[0]), make()(x)[0], rtol=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_a_layer_counts_its_ill_conditioned_pairs(rng, spherical):
    layer = make(spherical=spherical, epsilon=1e-4)
    x = jnp.concatenate([layer.kernel[...].T + 1e-3, jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)])
    assert int(layer.ill_conditioned(x[None])) == 4
    assert int(layer.ill_conditioned(x[4:])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epsilon=-1.0), "epsilon is -1.0; it must be a positive finite number"),
        (dict(epsilon=0.0), "epsilon is 0.0"),
        (dict(epsilon=1e-60), "epsilon is 1e-60"),  # 0 in float32
        (dict(epsilon="a"), "epsilon is 'a'"),
        (dict(constant_alpha=float("nan")), "constant_alpha is nan; it must be finite"),
        (dict(bias_init=float("inf")), "bias_init is inf; it must be finite"),
        (dict(use_bias=False, scalar_bias=True), "scalar_bias True without a bias"),
        (dict(dtype="float33"), "dtype is 'float33'; it must be a floating dtype"),
        (dict(dtype="int32"), "dtype is 'int32'"),
        (dict(drop_rate=-0.1), "drop_rate is -0.1"),
        (dict(epsilon=float("nan")), "epsilon is nan"),
        (dict(epsilon=float("inf")), "epsilon is inf"),
        (dict(constant_bias=0.1, use_bias=False), "constant_bias is 0.1 and use_bias"),
        (dict(constant_bias=0.1, softplus_bias=True), "constant_bias is 0.1"),
        (dict(softplus_bias=True, bias_init=0.0), "bias_init is 0.0 with softplus_bias"),
        (dict(distance="near"), "distance is 'near'; it must be one of expanded, exact"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        YatNMN(6, 4, **options, rngs=nnx.Rngs(0))


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x is \(2, 5\) and in_features is 6"):
        make()(jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="x is int32; cast it to a floating dtype such as float32"):
        make()(jnp.ones((2, 6), int))
    for use in (lambda x: make().init_from_data(x, jax.random.key(0)), make().ill_conditioned):
        with pytest.raises(ValueError, match=r"x is \(9, 5\) and in_features is 6"):
            use(jnp.ones((9, 5)))
    for sizes, name in [((0, 3), "in_features is 0"), ((3, 2.0), "out_features is 2.0")]:
        with pytest.raises(ValueError, match=name):
            YatNMN(*sizes, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'biased'"):
        YatNMN(6, 4, biased=True, rngs=nnx.Rngs(0))
