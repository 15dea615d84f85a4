"""The attention layers: parameters, what reaches the kernel, the cache, rotation, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn import Attention, KVCache, YatAttention
from tools import reference as ref

B, T, D = 2, 7, 8
UNIT = dict(bias_init=0.2, alpha_init=4.0, epsilon=0.3)


def make(kind="yat", heads=4, **options):
    """A layer whose heads differ: its parameters are moved by noise."""
    if kind == "dot":
        layer = Attention(D, heads, rngs=nnx.Rngs(0), **options)
    else:
        layer = YatAttention(D, heads, rngs=nnx.Rngs(0), **(UNIT | options))
    rng = np.random.default_rng(5)
    noise = lambda p: p + jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype)  # noqa: E731
    nnx.update(layer, jax.tree.map(noise, nnx.state(layer, nnx.Param)))
    return layer


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def run(layer, *args, **options):
    """Call the layer, compiled once."""
    return jax.jit(lambda a, o: layer(*a, **o)[0])(args, options)


def exact(layer, x, context=None, mask=None, positions=None, context_positions=None):
    """The layer in NumPy, from its parameters."""

    def linear(part, x):
        y = np.float64(x) @ np.float64(part.kernel[...])
        return y if part.bias is None else y + np.float64(part.bias[...])

    source = x if context is None else context
    q, k, v = (
        linear(part, a).reshape(*a.shape[:2], -1, layer.head_features)
        for part, a in ((layer.query, x), (layer.key, source), (layer.value, source))
    )
    if layer.rope_theta is not None:
        at = np.arange(x.shape[1])[None] if positions is None else positions
        q = ref.rotate(q, at, layer.rope_theta)
        k = ref.rotate(k, at if context_positions is None else context_positions, layer.rope_theta)
    n, unit = layer.weighting(), layer.unit()
    unit = {name: np.float64(unit[name]) for name in ("bias", "alpha", "epsilon")} | dict(spherical=layer.spherical)
    weighing = dict(normalization=n.name, power=n.power, l1_epsilon=n.constant)
    y = ref.yat_attention(q, k, v, mask=mask, **weighing, **unit)
    return linear(layer.out, y.reshape(*x.shape[:2], -1))


def test_parameters_have_nmn_s_names():
    options = dict(num_kv_heads=2, qkv_features=16, out_features=6, learnable_epsilon=True)
    layer = nnx.eval_shape(lambda: YatAttention(D, 4, rngs=nnx.Rngs(0), **options))
    found = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(layer))}
    assert found == {
        **{"query/kernel": (8, 16), "key/kernel": (8, 8), "value/kernel": (8, 8), "out/kernel": (16, 6)},
        **{"query/bias": (16,), "key/bias": (8,), "value/bias": (8,), "out/bias": (6,)},
        **{"bias": (4,), "alpha": (4,), "epsilon_param": (4,)},
    }
    for name in ("bias", "alpha", "epsilon_param"):
        assert getattr(layer, name).get_metadata()["axes"] == ("heads",)
    assert not hasattr(make("dot"), "alpha")


def test_options_of_the_unit_reach_the_score():
    score = make(softplus_bias=True, use_bias=False).score()
    assert score.nonnegative_bias and score.bias.shape == (4,) and make(use_bias=False).query.bias is None
    assert not make().score().nonnegative_bias
    score = make(use_score_bias=False, constant_alpha=True, spherical=True, distance="exact").score()
    assert (score.bias, score.alpha, score.epsilon, score.spherical) == (0.0, 2**0.5, 0.3, True)
    assert score.distance == "exact" and make(constant_bias=0.5).score().bias == 0.5
    assert make(normalization="l1").weighting().constant == 0.3
    learned = make(normalization="l1", learnable_epsilon=True)
    np.testing.assert_array_equal(learned.weighting().constant, learned.unit()["epsilon"])
    softermax = make(normalization="softermax", power=2.0).weighting()
    assert (softermax.power, softermax.constant) == (2.0, 1e-12)


def test_kernels_start_at_one_over_the_root_of_their_inputs():
    usual = dict(query=1 / 8, key=32**-0.5, value=32**-0.5, out=1 / 16)
    for options, stds in (({}, usual), (dict(std=0.5, out_std=0.1), dict(query=0.5, key=0.5, value=0.5, out=0.1))):
        layer = Attention(64, 4, qkv_features=256, in_kv_features=32, rngs=nnx.Rngs(0), **options)
        for name, std in stds.items():
            assert abs(np.std(getattr(layer, name).kernel[...]) / std - 1) < 0.05


TRI = np.tri(T, dtype=bool)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2]])
VALID = np.random.default_rng(1).random((B, T)) < 0.7
DENSE = np.random.default_rng(2).random((B, 4, T, T)) < 0.7
CALLS = dict(
    plain_call=(dict(), dict(), None),
    causal_spherical=(dict(spherical=True), dict(is_causal=True), TRI),
    window=(dict(window=3, num_kv_heads=2), dict(), TRI & ~np.tri(T, k=-3, dtype=bool)),
    segments=(dict(rope_theta=50.0), dict(segments=SEGMENTS), SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None]),
    padding_l1=(dict(normalization="l1"), dict(valid=VALID), VALID[:, None, None]),
    dense_softermax=(dict(normalization="softermax", power=2.0, use_bias=False), dict(mask=DENSE), DENSE),
)


@pytest.mark.parametrize(
    ("name", "impl"), [*((name, "plain") for name in CALLS), ("window", "blockwise"), ("padding_l1", "blockwise")]
)
def test_self_attention(rng, name, impl):
    options, call, mask = CALLS[name]
    layer, x = make(impl=impl, block=3, **options), draw(rng, B, T, D)
    flags = {k: v for k, v in call.items() if k == "is_causal"}
    arrays = {k: jnp.asarray(v) for k, v in call.items() if k not in flags}
    got = jax.jit(lambda x, arrays: layer(x, **arrays, **flags)[0])(x, arrays)
    np.testing.assert_allclose(got, exact(layer, x, mask=mask), atol=2e-5)


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
def test_cross_attention(rng, impl):
    """Keys of another width and length, with padding, two sets of segments, and positions of their own."""
    layer = make(in_kv_features=5, num_kv_heads=1, rope_theta=30.0, impl=impl, block=4)
    x, context = draw(rng, B, T, D), draw(rng, B, 9, 5)
    mine, theirs = rng.integers(0, 2, (B, T)), rng.integers(0, 2, (B, 9))
    valid = np.arange(9) < np.array([[9], [7]])
    at, there = rng.integers(0, 20, (B, T)), rng.integers(0, 20, (B, 9))
    mask = (mine[:, None, :, None] == theirs[:, None, None]) & valid[:, None, None]
    pairs = dict(segments=(jnp.asarray(mine), jnp.asarray(theirs)), positions=(jnp.asarray(at), jnp.asarray(there)))
    got = run(layer, x, context, valid=jnp.asarray(valid), **pairs)
    np.testing.assert_allclose(got, exact(layer, x, context, mask, at, there), atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="dot", impl="plain"),
        dict(num_kv_heads=2, window=3, impl="plain"),
        dict(num_kv_heads=2, window=3, impl="blockwise"),
        dict(spherical=True, normalization="l1", num_kv_heads=1, impl="blockwise"),
    ],
    ids=["dot", "grouped-window", "grouped-window-blockwise", "spherical-l1-shared-blockwise"],
)
def test_the_cache_gives_what_the_whole_gives(rng, options):
    layer = make(rope_theta=100.0, block=4, **options)
    x = draw(rng, B, T, D)

    @jax.jit
    def both(x):
        whole, none = layer(x, is_causal=True)
        cache, pieces = layer.init_cache(B, 10), []
        for first, last in ((0, 4), (4, 5), (5, 7)):
            y, cache = layer(x[:, first:last], cache=cache)
            pieces.append(y)
        return whole, none, jnp.concatenate(pieces, 1), cache

    whole, none, pieces, cache = both(x)
    assert none is None and isinstance(cache, KVCache) and cache.length == T
    assert cache.key.shape == (B, 10, layer.num_kv_heads, 2) and (cache.key[:, T:] == 0).all()
    np.testing.assert_allclose(pieces, whole, atol=1e-5)


def test_keys_are_rotated_once_when_they_are_written(rng):
    layer, x = make(rope_theta=10.0, spherical=True), draw(rng, B, T, D)

    @jax.jit
    def written(x):
        _, first = layer(x[:, :3], cache=layer.init_cache(B, T))
        return first, layer(x[:, 3:], cache=first)[1]

    first, last = written(x)
    np.testing.assert_array_equal(last.key[:, :3], first.key[:, :3])
    np.testing.assert_allclose(np.linalg.norm(last.key, axis=-1), 1.0, rtol=1e-5)
    k = (np.float64(x) @ np.float64(layer.key.kernel[...]) + np.float64(layer.key.bias[...])).reshape(B, T, 4, 2)
    np.testing.assert_allclose(last.key, ref.unit(ref.rotate(k, np.arange(T)[None], 10.0)), atol=1e-5)


@pytest.mark.parametrize(
    ("form", "impl"), [("is_causal", "plain"), ("window", "plain"), ("cache", "plain"), ("cache", "blockwise")]
)
def test_no_position_feels_a_later_one(rng, form, impl):
    layer = make(impl=impl, block=3, rope_theta=10.0, window=3 if form == "window" else None)
    x = draw(rng, 1, T, D)

    @jax.jit
    def felt(x):
        call = dict(is_causal=dict(is_causal=True), window={}, cache=dict(cache=layer.init_cache(1, T)))[form]
        y, back = jax.vjp(lambda x: layer(x, **call)[0], x)
        rows = jax.vmap(lambda row: back(row[None, :, None] * jnp.ones_like(y))[0])(jnp.eye(T))
        return jnp.abs(rows[:, 0]).sum(-1) > 0

    seen = TRI & ~np.tri(T, k=-3, dtype=bool) if form == "window" else TRI
    np.testing.assert_array_equal(felt(x), seen)


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="dot", rope_theta=100.0),
        dict(spherical=True, use_bias=False),
        dict(num_kv_heads=2, window=3, normalization="l1"),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_and_values_make_the_output(rng, options, causal):
    layer, x, rows = make(**options), draw(rng, B, T, D), jnp.asarray([5, 2])
    weights, values = layer.weights(x, rows, is_causal=causal)
    assert weights.shape == (B, 4, 2, T) and values.shape == (B, T, 4, D // 4)
    if causal or layer.window:
        assert not weights[:, :, 1, 3:].any() and weights[:, :, 1, 2].all()
    made = layer.out(jnp.einsum("bhrt,bthk->brhk", weights, values).reshape(B, 2, D))
    np.testing.assert_allclose(made, layer(x, is_causal=causal)[0][:, rows], rtol=1e-4, atol=1e-5)


def test_rotation_is_by_differences_of_positions_and_only_with_theta(rng):
    x = draw(rng, 1, T, D)
    at = jnp.arange(T)[None]
    for theta, same in ((None, True), (100.0, False)):
        layer = make("dot", rope_theta=theta)
        first, later, spread = (run(layer, x, positions=p) for p in (at, at + 5, 3 * at))
        np.testing.assert_allclose(later, first, atol=1e-5)
        assert np.allclose(spread, first, atol=1e-6) == same
        np.testing.assert_array_equal(run(layer, x), first)


def test_bfloat16_is_close_to_float32(rng):
    x = draw(rng, B, T, D)
    right, near = (run(make(spherical=True, dtype=dtype), x) for dtype in ("float32", "bfloat16"))
    assert near.dtype == "bfloat16" and make(dtype="bfloat16").init_cache(1, 2).key.dtype == "bfloat16"
    assert np.linalg.norm(near.astype(jnp.float32) - right) < 2e-2 * np.linalg.norm(right)


@pytest.mark.parametrize("normalization", ["softmax", "l1", "softermax"])
def test_a_zero_input_has_finite_gradients(normalization):
    """Queries and keys are zero vectors, whose direction is not defined."""
    layer = make(spherical=True, use_bias=False, normalization=normalization, learnable_epsilon=True)
    graph, params = nnx.split(layer)
    loss = lambda p, x: jnp.sum(nnx.merge(graph, p)(x, is_causal=True)[0] ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros((1, T, D)).at[0, 2].set(1.0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


BAD_OPTIONS = [
    (dict(heads=3), "qkv_features is 8 and num_heads 3"),
    (dict(num_kv_heads=3), "num_heads is 4 and num_kv_heads 3"),
    (dict(qkv_features=12, rope_theta=10.0), "qkv_features / num_heads is 3; rotary"),
    (dict(window=True), "window is True; it must be an integer of at least 1"),
    (dict(impl="Flash"), "impl is 'Flash'; it must be one of auto, plain, blockwise, flash"),
    (dict(block=0), "block is 0"),
    (dict(normalization="L1"), "normalization is 'L1'; it must be one of softmax, l1, softermax"),
    (dict(power=2.0), "power is 2.0 with softmax"),
    (dict(normalization="softermax", power=-1.0), "power is -1.0 with softermax"),
    (dict(distance="near"), "distance is 'near'; it must be one of expanded, exact"),
    (dict(epsilon=0.0), "epsilon is 0.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_named(options, message):
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        layer = YatAttention(D, options.pop("heads", 4), rngs=nnx.Rngs(0), **options)
        jax.eval_shape(lambda x: layer(x)[0], jnp.ones((B, T, D)))


def test_bad_calls_are_named():
    layer, windowed = make(rope_theta=10.0), make(window=2)
    x, context = jnp.ones((B, T, D)), jnp.ones((B, 3, D))
    bad = [
        (layer, (x[..., :5],), {}, r"x is \(2, 7, 5\) and .*must be \(b, t, 8\) and \(b, s, 8\)"),
        (layer, (x.astype(int),), {}, "x is int32"),
        (layer, (x[0],), {}, r"x is \(7, 8\)"),
        (layer, (x, context[:1]), {}, r"x is \(2, 7, 8\) and .* \(1, 3, 8\)"),
        (make(in_kv_features=3), (x, context), {}, r"\(2, 3, 8\).*\(b, s, 3\)"),
        (layer, (x, context), dict(is_causal=True), "is_causal=True.*cross attention"),
        (windowed, (x, context), {}, "window=2"),
        (layer, (x, context), dict(cache=layer.init_cache(B, T)), "cache=True"),
        (layer, (x, context), dict(segments=jnp.zeros((B, T))), r"segments is one array \(2, 7\)"),
        (layer, (x,), dict(segments=jnp.zeros((B, 3))), r"query_segments is \(2, 3\); it must be \(2, 7\)"),
        (layer, (x,), dict(segments=jnp.zeros((B, T)), cache=layer.init_cache(B, T)), "segments and cache"),
        (layer, (x,), dict(valid=jnp.ones((B, 3), bool)), r"valid is \(2, 3\); it must be \(2, 7\)"),
        (layer, (x,), dict(mask=jnp.ones((3, T, T), bool)), r"mask is \(3, 7, 7\)"),
        (layer, (x,), dict(positions=jnp.zeros((B, 3), int)), r"positions is \(2, 3\)"),
        (layer, (x,), dict(cache=layer.init_cache(1, T)), r"cache holds \(1, 7, 4, 2\)"),
        (layer, (x,), dict(cache=layer.init_cache(B, 3)), r"cache holds \(2, 3, 4, 2\)"),
    ]
    for module, args, options, message in bad:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda a, m=module, o=options: m(*a, **o)[0], args)


@pytest.mark.parametrize("impl", ["plain", "blockwise"])
def test_heads_may_share_one_bias(rng, impl):
    x = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    shared = dict(softplus_bias=True, bias_init=0.3, epsilon=0.5, impl=impl, block=2)
    one, each = (YatAttention(8, 2, scalar_bias=b, **shared, rngs=nnx.Rngs(0)) for b in (True, False))
    assert one.bias[...].shape == (1,) and each.bias[...].shape == (2,)

    def run(layer):
        graph, params = nnx.split(layer)
        return jax.jit(lambda p: jax.value_and_grad(lambda p: (nnx.merge(graph, p)(x)[0] ** 2).sum())(p))(params)

    (y, grads), (want, right) = run(one), run(each)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    np.testing.assert_allclose(grads["bias"][...][0], right["bias"][...].sum(), rtol=1e-3, atol=1e-5)


def test_a_full_cache_is_named():
    layer = YatAttention(8, 2, rngs=nnx.Rngs(0))
    _, cache = layer(jnp.ones((1, 4, 8)), cache=layer.init_cache(1, 6))
    with pytest.raises(ValueError, match="cache holds 4 of 6 positions and x has 3 more"):
        layer(jnp.ones((1, 3, 8)), cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_kv_heads=0), "num_kv_heads is 0; it must be an integer"),
        (dict(window=2.5), "window is 2.5; it must be an integer"),
        (dict(window=0), "window is 0"),
        (dict(impl="foo"), "impl is 'foo'; it must be one of auto, plain, blockwise"),
        (dict(dtype="int8"), "dtype is 'int8'"),
    ],
)
def test_options_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        YatAttention(8, 2, **options, rngs=nnx.Rngs(0))


def test_wavelengths_and_empty_inputs_are_checked():
    with pytest.raises(ValueError, match="theta is -1.0; it must be a positive"):
        YatAttention(8, 2, rope_theta=-1.0, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8)))
    with pytest.raises(ValueError, match=r"\(0, 3, 8\)"):
        YatAttention(8, 2, rngs=nnx.Rngs(0))(jnp.ones((0, 3, 8)))
