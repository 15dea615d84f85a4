from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn.linear_attention import YatLinearAttention
from aether.nn.param import stack
from aether.testing import equations

WIDTH, HEADS, LENGTH = 16, 2, 11


def layer(features="taylor", num_features=45, **options):
    """A layer of two heads of width 8 whose Taylor features are all there."""
    return YatLinearAttention(
        WIDTH, HEADS, features=features, num_features=num_features, block=8, chunk=4, rngs=nnx.Rngs(0), **options
    )


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH)), jnp.float32)


def turned(x, positions, theta):
    """Rotate pairs as complex numbers."""
    z = x[..., 0::2] + 1j * x[..., 1::2]
    z = z * np.exp(1j * positions[..., None, None] * theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]))
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def reference(module, x, pairs, degree, bias=1.0, epsilon=0.1, theta=None):
    """The layer in float64 with κ itself (degree None) or its Taylor polynomial, over the pairs allowed."""
    x = np.asarray(x, np.float64)
    parts = ((name, getattr(module, name)) for name in ("query", "key", "value", "out"))
    maps = {n: (np.asarray(m.kernel[...], np.float64), np.asarray(m.bias[...])) for n, m in parts}
    q, k, v = ((x @ maps[n][0] + maps[n][1]).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
    if theta is not None:
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        q, k = turned(q, positions, theta), turned(k, positions, theta)
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    s, c = np.einsum("bthk,bshk->bhts", q, k), 2 + epsilon
    series = sum((2 * s / c) ** n for n in range(degree + 1)) / c if degree else 1 / (c - 2 * s)
    if degree == 2:
        weights = (bias**2 + (2 * bias + bias**2 * 2 / c) * s + (1 + bias * 2 / c) ** 2 * s * s) / c
    else:
        weights = (s + bias) ** 2 * series
    weights = weights * pairs[:, None]
    y = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(x.shape) @ maps["out"][0] + maps["out"][1]


def causal(x):
    return np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (len(x), LENGTH, LENGTH))


def test_equals_a_float64_layer_with_the_cut_kernel(x):
    segments = np.repeat([[0, 1, 2]], [3, 6, 2], 1).repeat(2, 0)
    mask = np.ones((2, LENGTH), bool)
    mask[0, 4:6] = False
    same = segments[:, :, None] == segments[:, None]
    plain, rotary = layer(), layer(rope_theta=100.0)

    @jax.jit
    def run(x):
        return (
            rotary(x)[0],
            plain(x, segments=jnp.asarray(segments), mask=jnp.asarray(mask))[0],
            plain(x, is_causal=False, mask=jnp.asarray(mask))[0],
        )

    full = np.broadcast_to(mask[:, None], same.shape)
    references = (
        reference(rotary, x, causal(x), 2, theta=100.0),
        reference(plain, x, causal(x) & same & full, 2),
        reference(plain, x, full, 2),
    )
    for y, expected in zip(run(x), references, strict=True):
        np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_and_values_make_the_output(x, causal):
    module, rows = layer(rope_theta=100.0), jnp.asarray([8, 1])
    weights, values = module.weights(x, rows, is_causal=causal)
    made = module.out(jnp.einsum("bhrt,bthk->brhk", weights, values).reshape(len(x), 2, -1))
    np.testing.assert_allclose(made, module(x, is_causal=causal)[0][:, rows], atol=2e-5)
    assert weights[:, :, 1, 2:].any() == (not causal)


def test_fitted_anchors_approach_the_kernel_itself_and_train(x, rng):
    module = layer("anchored", 9 + 120)
    other = jnp.asarray(rng.normal(size=(12, LENGTH, WIDTH)), jnp.float32)
    exact = reference(module, x, causal(x), None)
    graph, state = nnx.split(module)

    @jax.jit
    def run(state, x):
        def loss(state):
            y, _ = nnx.merge(graph, state)(x)
            return jnp.mean((y - exact) ** 2), y

        (value, y), gradients = jax.value_and_grad(loss, has_aux=True)(state)
        return value, y, gradients

    before = np.asarray(module.anchors[...])
    run(nnx.state(module), x)
    np.testing.assert_array_equal(module.anchors[...], before)  # only `fit` sets them
    module.fit(other, jax.random.key(0))
    assert module.anchors.get_metadata()["axes"] == ("heads", None, None)
    np.testing.assert_allclose(jnp.linalg.norm(module.anchors[...], axis=-1), 1, atol=1e-5)
    value, y, gradients = run(nnx.state(module), x)
    assert np.linalg.norm(y - exact) < 0.2 * np.linalg.norm(exact)  # 0.15 measured
    anchors = gradients["anchors"][...]
    assert bool(jnp.isfinite(anchors).all()) and float(jnp.abs(anchors).max((1, 2)).min()) > 0
    module.anchors[...] = module.anchors[...] - 1e-3 * anchors / jnp.linalg.norm(anchors)
    assert run(nnx.state(module), x)[0] < value
    zeros = run(nnx.state(module), jnp.zeros_like(x))[2]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(zeros))


@pytest.mark.parametrize(("features", "m"), [("taylor", 30), ("anchored", 20)])
def test_causal_and_decoding_equal_the_full_pass(x, features, m):
    module = layer(features, m, rope_theta=100.0)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))

    @jax.jit
    def run(x):
        y, back = jax.vjp(lambda x: module(x)[0], x)
        (reach,) = back(jnp.zeros_like(y).at[:, 5].set(1.0))
        prompt, cache = module(x[:, :6], positions[:, :6], cache=module.init_cache(2))

        def one(cache, i):
            at = partial(jax.lax.dynamic_slice_in_dim, start_index=i, slice_size=1, axis=1)
            y, cache = module(at(x), at(positions), cache=cache)
            return cache, y[:, 0]

        cache, rest = jax.lax.scan(one, cache, jnp.arange(6, LENGTH))
        return y, jnp.concatenate([prompt, rest.swapaxes(0, 1)], 1), jnp.abs(reach).max((0, 2)), cache

    y, decoded, reach, cache = run(x)
    np.testing.assert_allclose(decoded, y, atol=1e-5)
    assert np.all(reach[:6] > 0) and np.all(reach[6:] == 0)
    assert cache.kv.shape == (2, HEADS, m, WIDTH // HEADS)


def test_drawn_features_come_from_the_seed_and_are_no_parameters(x):
    one, again, other = layer(num_features=30), layer(num_features=30), layer(num_features=30, feature_seed=1)
    assert set(nnx.to_flat_state(nnx.state(one)).paths) == {
        (name, part) for name in ("query", "key", "value", "out") for part in ("kernel", "bias")
    }
    phi = [jax.jit(lambda x, m=m: m.feature_map()[0](m.prepare(x)[0]))(x) for m in (one, again, other)]
    np.testing.assert_array_equal(phi[0], phi[1])
    assert float(jnp.abs(phi[0] - phi[2]).max()) > 0.1
    assert float(jnp.abs(phi[0][:, :, 0] - phi[0][:, :, 1]).max()) > 0.1  # heads differ


def test_can_be_stacked_and_runs_in_bfloat16(x):
    layers = stack(lambda rngs: YatLinearAttention(16, 2, num_features=20, dtype="bfloat16", rngs=rngs), 2, nnx.Rngs(0))
    assert layers.anchors.shape == (2, 2, 11, 8)
    graph, state = nnx.split(layers)
    run = jax.jit(lambda x: jax.lax.scan(lambda x, s: (x + nnx.merge(graph, s)(x)[0], None), x, state)[0])
    y = run(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and bool(jnp.isfinite(y).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(features="performer"), "features is 'performer'; it must be one of anchored, taylor, slay"),
        (dict(features="taylor", num_features=46), "num_features is 46 at width 8"),
        (dict(features="anchored", num_features=9), "num_features is 9 at head width 8"),
        (dict(bias=-1.0), "bias is -1.0"),
        (dict(epsilon=float("inf")), "epsilon is inf"),
        (dict(num_heads=3), "in_features is 16 and num_heads 3"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(num_heads=16, rope_theta=1e4), "head width 1; rotation needs an even width"),
        (dict(tail_probability=0.5), "tail_probability is 0.5, features 'anchored'"),
        (dict(chunk=0), "chunk is 0"),
        (dict(block=0), "block is 0"),
    ],
)
def test_bad_construction_is_named(change, words):
    options = dict(num_heads=2, features="anchored", num_features=20) | change
    with pytest.raises(ValueError, match=words):
        YatLinearAttention(16, options.pop("num_heads"), rngs=nnx.Rngs(0), **options)


def test_bad_calls_are_named(x):
    module = layer(rope_theta=100.0)
    for arguments, words in (
        (dict(x=x[..., :8]), r"x is \(2, 11, 8\) and in_features is 16"),
        (dict(x=x, mask=jnp.ones((2, 3), bool)), r"mask is \(2, 3\)"),
        (dict(x=x, cache=module.init_cache(2)), "positions is None"),
        (dict(x=x, cache=module.init_cache(2), is_causal=False), "cache is given with is_causal=False"),
    ):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(lambda arguments=arguments: module(**arguments))
    with pytest.raises(ValueError, match="fit is called on a layer without anchors"):
        module.fit(x, jax.random.key(0))


def test_heads_are_factored_one_after_the_other():
    """Batches of LAPACK calls hang now and then on two cores: none may have a batch axis, forward or backward."""
    layer = YatLinearAttention(WIDTH, HEADS, features="anchored", num_features=12, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jnp.ones((1, 4, layer.num_heads * layer.width))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(x)[0].sum()))(params)
    calls = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("cholesky", "triangular_solve", "qr")]
    assert len(calls) >= 3 and all(v.aval.ndim == 2 for e in calls for v in e.invars)


@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_equal_anchors_have_a_factor(epsilon):
    """Texts repeat tokens: k-means then gives equal anchors, and a Gram matrix whose rounding must not matter."""
    layer = YatLinearAttention(16, 1, num_features=97, epsilon=epsilon, rngs=nnx.Rngs(0))
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, 5, 16)), (1, 20, 1))
    layer.fit(x, jax.random.key(0))
    graph, params = nnx.split(layer)
    value = jax.jit(jax.value_and_grad(lambda p: (nnx.merge(graph, p)(x)[0] ** 2).sum()))
    y, grads = value(params)
    assert y > 1.0 and all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_what_is_not_a_number_stays_so():
    layer = YatLinearAttention(16, 1, num_features=30, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 16)).at[0, 2].set(jnp.nan)
    assert jnp.isnan(layer(x)[0][0, 2:]).all()


def test_inputs_that_do_not_fit_are_named_as_elsewhere():
    layer = YatLinearAttention(16, 1, num_features=30, rope_theta=1e4, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4, 16))
    for call, message in [
        (lambda: layer(x.astype(int)), "x is int32; cast it"),
        (lambda: layer(x[:, :0]), r"x is \(2, 0, 16\)"),
        (lambda: layer(x, jnp.arange(4)), r"positions is \(4,\); it must be \(2, 4\)"),
        (lambda: layer(x, jnp.zeros((2, 4), int), cache=layer.init_cache(1)), r"init_cache\(2\) makes one that fits"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
