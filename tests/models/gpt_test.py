"""The networks: sizes, switches, causality, segments, cache, dropout, and GPT-2 against NumPy in float64."""

import math
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import SIZES, ModelConfig
from aether.losses import lm
from aether.models import GPT
from aether.testing import VOCAB, drawn_model, equations, tiny_batch, tiny_config, tiny_model

T = 6
PARTS = dict(attention=("yat", "dot"), mlp=("yat", "gelu"), norm=("none", "layernorm"), position=("rotary", "learned"))
COMBINATIONS = [dict(zip(PARTS, choice, strict=True)) for choice in product(*PARTS.values())]
NAMED = {("yat", "none"), ("gelu", "layernorm")}  # of MLP and norm, as they come in the two kinds; the rest is slow
ATTENTIONS = [dict(attention=a, position=p) for a, p in product(PARTS["attention"], PARTS["position"])]


def label(parts):
    return "-".join(parts.values())


def make(**model):
    return tiny_model(tiny_config(model.pop("kind", "aether"), model=model, data=dict(context=T)))


def drawn(**model):
    return drawn_model(tiny_config(model.pop("kind", "aether"), model=model, data=dict(context=T)))


def shapes(config, context=1024):
    model = nnx.eval_shape(lambda: GPT(config, context, nnx.Rngs(0)))
    return {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(
    ("size", "count"), [("124m", 124_439_808), ("350m", 354_823_168), ("774m", 774_030_080), ("1.5b", 1_557_611_200)]
)
def test_gpt2_has_gpt2_s_parameters(size, count):
    found = shapes(ModelConfig(kind="gpt2", size=size, vocab_multiple=1).resolved(50257))
    assert sum(map(math.prod, found.values())) == count


@pytest.mark.parametrize("size", SIZES["gpt"])
def test_aether_differs_from_the_baseline_by_what_it_says(size):
    """No norm, no biases in linear maps, no positions; a head, and b, α and ε of each unit."""
    c = ModelConfig(size=size, vocab_multiple=8).resolved(1000)
    found = shapes(c)
    assert not [path for path in found if "norm" in path or "scale" in path]
    n, d, h, f = c.layers, c.width, c.heads, c.hidden
    per_layer = 4 * d * d + 2 * d * f + 3 * h + f + 2
    assert sum(map(math.prod, found.values())) == 2 * 1000 * d + n * per_layer
    assert f == 4 * d and found["blocks/attention/alpha"] == (n, h) and found["blocks/mlp/hidden/bias"] == (n, f)


def test_one_field_turns_each_part():
    base = ModelConfig(layers=2, heads=2, width=16).resolved(VOCAB)
    before = set(shapes(base))
    added = dict(
        attention=("dot", set()),
        mlp=("gelu", set()),
        norm=("layernorm", {"norm/scale", "blocks/norm1/scale", "blocks/norm2/scale"}),
        position=("learned", {"position/embedding"}),
        head=("tied", set()),
        linear_bias=(
            "yes",
            {f"blocks/attention/{k}/bias" for k in ("query", "key", "value", "out")} | {"blocks/mlp/out/bias"},
        ),
    )
    gone = dict(
        attention={f"blocks/attention/{k}" for k in ("bias", "alpha", "epsilon_param")},
        mlp={f"blocks/mlp/hidden/{k}" for k in ("bias", "alpha", "epsilon_param")},
        head={"head/kernel"},
    )
    for name, (value, new) in added.items():
        assert set(shapes(replace(base, **{name: value}))) == before - gone.get(name, set()) | new, name


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(c, id=label(c), marks=() if (c["mlp"], c["norm"]) in NAMED else pytest.mark.slow)
        for c in COMBINATIONS
    ],
)
def test_no_position_feels_a_later_token(rng, parts):
    """Causality by gradient: all tokens differ, so d(hidden state t)/d(embedding row s) must vanish just for s > t."""
    graph, params = nnx.split(drawn(**parts))

    @jax.jit
    def rows(params, cotangents):
        _, back = jax.vjp(lambda p: nnx.merge(graph, p)(jnp.arange(T)[None])[0][0], params)
        return jax.vmap(lambda g: back(g)[0]["embed"]["embedding"][...])(cotangents)

    cotangents = jnp.eye(T)[..., None] * rng.normal(size=(T, 16))
    felt = np.abs(np.asarray(rows(params, cotangents))[:, :T]).sum(-1) > 0
    np.testing.assert_array_equal(felt, np.tri(T, dtype=bool))


@pytest.mark.parametrize("parts", ATTENTIONS, ids=label)
def test_packed_documents_are_as_if_apart(parts):
    model = drawn(**parts)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9]])
    segments, positions = jnp.asarray([[1, 1, 1, 1, 2, 2]]), jnp.asarray([[0, 1, 2, 3, 0, 1]])

    @jax.jit
    def both(tokens):
        packed = model(tokens, segments=segments, positions=positions)[0]
        return packed, jnp.concatenate([model(tokens[:, :4])[0], model(tokens[:, 4:])[0]], 1), model(tokens)[0]

    packed, apart, leaking = both(tokens)
    np.testing.assert_allclose(packed, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(packed - leaking)[:, 4:].max() > 1e-3


def test_blockwise_attention_changes_no_gradient():
    """Packed documents, in layers that are scanned and recomputed."""
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9]])
    packed = dict(segments=jnp.asarray([[1, 1, 1, 1, 2, 2]]), positions=jnp.asarray([[0, 1, 2, 3, 0, 1]]))

    def loss(impl):
        graph, params = nnx.split(drawn(attention_impl=impl, remat="full"))
        return params, lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(tokens, **packed)[0]))

    (params, plain), (_, blocks) = loss("plain"), loss("blockwise")
    names = {e.primitive.name for e in equations(jax.make_jaxpr(blocks)(params).jaxpr)}
    assert "while" in names
    one, other = jax.jit(lambda p: (jax.grad(plain)(p), jax.grad(blocks)(p)))(params)
    largest = max(float(jnp.linalg.norm(a)) for a in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(a)) + 1e-6 * largest


@pytest.mark.parametrize("parts", ATTENTIONS, ids=label)
def test_decoding_with_the_cache_is_the_whole_pass(parts):
    model = drawn(**parts)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])

    @jax.jit
    def both(tokens):
        cache, pieces = model.init_cache(2, 8), []
        for piece in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:5], tokens[:, 5:]):
            hidden, cache = model(piece, cache=cache)
            pieces.append(hidden)
        return jnp.concatenate(pieces, 1), model(tokens)[0], cache.length

    pieces, whole, length = both(tokens)
    assert length.tolist() == [T, T]
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)


def test_dropout_is_a_function_of_its_key():
    model, dry = drawn(dropout=0.5), drawn(dropout=0.0)
    run = jax.jit(lambda k: model(jnp.arange(T)[None], key=k)[0])
    one, other = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert (one != other).any()
    still, no_key = jax.jit(lambda k: (dry(jnp.arange(T)[None], key=k)[0], model(jnp.arange(T)[None])[0]))(
        jax.random.key(1)
    )
    np.testing.assert_array_equal(still, no_key)  # same seed, so the same parameters
    assert (no_key != one).any()


def test_dropout_keeps_the_mean_and_drops_as_many_as_it_says():
    model = make(dropout=0.25, attention_alpha=1.0, mlp_alpha=1.0)
    for path in ("attention", "mlp"):
        kernel = getattr(model.blocks, path).out.kernel
        kernel[...] = jnp.zeros_like(kernel[...])  # both branches are 0: the embedding's dropout alone is left
    run = jax.jit(jax.vmap(lambda k: model(jnp.arange(T)[None], key=k)[0]))
    many = np.asarray(run(jax.random.split(jax.random.key(0), 400)))
    table = np.asarray(model.embed.embedding[...])[:T]
    assert abs((many == 0).mean() - 0.25) < 0.01
    np.testing.assert_allclose(many.mean(0)[0], table, atol=5 * np.abs(table).max() * (0.25 / 0.75 / 400) ** 0.5)
    np.testing.assert_allclose(many.max(0)[0][table > 0], table[table > 0] / 0.75, rtol=1e-5)


@pytest.mark.parametrize("kind", ["aether", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_recomputing_blocks_changes_no_gradient(kind):
    def loss(remat):
        graph, params = nnx.split(drawn(kind=kind, remat=remat, dropout=0.1))
        return params, lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(jnp.arange(T)[None], key=jax.random.key(0))[0]))

    (params, plain), (_, again) = loss("none"), loss("full")
    names = [{e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(f))(params).jaxpr)} for f in (plain, again)]
    assert ["remat2" in n or "checkpoint" in n for n in names] == [False, True]
    one, other = jax.jit(lambda p: (jax.grad(plain)(p), jax.grad(again)(p)))(params)
    largest = max(float(jnp.linalg.norm(a)) for a in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(a)) + 1e-6 * largest


def test_a_tied_head_is_the_embedding():
    tied, apart = drawn(head="tied", embed_std=0.5), make(head="untied", vocab_multiple=1)
    assert tied.head is None
    np.testing.assert_array_equal(tied.head_kernel(), tied.embed.embedding[...].T)
    assert tied.gain == 25.0 and apart.gain == 1.0
    assert (apart.head_kernel() == apart.head.kernel[...]).all()
    assert abs(float(apart.head_kernel().std()) - 0.02) < 2e-3
    baseline = drawn(kind="gpt2")
    assert baseline.gain == 1.0
    np.testing.assert_array_equal(baseline.head_kernel(), baseline.embed.embedding[...].T)


@pytest.mark.parametrize("kind", ["aether", "gpt2"])
def test_bfloat16_is_close_to_float32(kind):
    tokens = jnp.arange(2 * T).reshape(2, T)
    exact, half = (drawn(kind=kind, dtype=dtype) for dtype in ("float32", "bfloat16"))
    run = jax.jit(lambda t: (exact.logits(exact(t)[0]), half.logits(half(t)[0]), half(t)[0]))
    right, near, hidden = run(tokens)
    assert hidden.dtype == "bfloat16" and near.dtype == "float32"
    assert all(p.dtype == "float32" for p in jax.tree.leaves(nnx.state(half)))
    assert float(jnp.linalg.norm(near - right)) < 2e-2 * float(jnp.linalg.norm(right))


def gpt2(p, tokens, layers, heads):
    """GPT-2 in NumPy, one sequence: pre-norm blocks, tanh GELU, tied head; p maps paths to float64 arrays."""

    def norm(x, name, *at):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}/scale"][at] + p[f"{name}/bias"][at]

    def linear(x, name, i):
        return x @ p[f"blocks/{name}/kernel"][i] + p[f"blocks/{name}/bias"][i]

    t = len(tokens)
    x = p["embed/embedding"][tokens] + p["position/embedding"][:t]
    for i in range(layers):
        y = norm(x, "blocks/norm1", i)
        q, k, v = (linear(y, f"attention/{name}", i).reshape(t, heads, -1) for name in ("query", "key", "value"))
        out = np.zeros_like(v)
        for head, row in np.ndindex(heads, t):
            scores = k[: row + 1, head] @ q[row, head] / np.sqrt(k.shape[-1])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[: row + 1, head]
        x = x + linear(out.reshape(t, -1), "attention/out", i)
        h = linear(norm(x, "blocks/norm2", i), "mlp/hidden", i)
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, "mlp/out", i)
    return norm(x, "norm") @ p["embed/embedding"].T


@pytest.mark.parametrize("multiple", [1, 24])
def test_the_baseline_is_gpt2(rng, multiple):
    model = drawn(kind="gpt2", vocab_multiple=multiple)
    params = nnx.state(model)
    exact = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(params)}
    tokens = rng.integers(0, VOCAB, T)
    got = jax.jit(lambda t: model.logits(model(t)[0]))(jnp.asarray(tokens)[None])[0]
    want = gpt2(exact, tokens, model.config.layers, model.config.heads)[:, :VOCAB]
    assert got.shape == want.shape == (T, VOCAB) and model.embed.embedding.shape[0] == VOCAB + 16 * (multiple == 24)
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def test_projections_into_the_stream_start_small():
    model = tiny_model(tiny_config("gpt2", model=dict(layers=8, width=64)))
    for kernel, std in [(model.blocks.attention.out.kernel, 0.02 / 4), (model.blocks.mlp.out.kernel, 0.02 / 4)]:
        assert abs(float(kernel[...].std()) / std - 1) < 0.02
    assert abs(float(model.blocks.attention.query.kernel[...].std()) / 0.02 - 1) < 0.02
    model = tiny_model(tiny_config("aether", model=dict(layers=8, width=64)))
    assert abs(float(model.blocks.attention.query.kernel[...].std()) * 8 - 1) < 0.02
    assert abs(float(model.blocks.attention.out.kernel[...].std()) / 0.005 - 1) < 0.02


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_padding_the_vocabulary_changes_nothing(head):
    """Same draws, zeros behind them; no loss, gradient or guess depends on what the padding holds."""
    plain, padded = make(head=head, vocab_multiple=1), make(head=head, vocab_multiple=128)
    assert padded.embed.embedding.shape == (128, 16) and plain.embed.embedding.shape == (VOCAB, 16)
    np.testing.assert_array_equal(padded.embed.embedding[...][:VOCAB], plain.embed.embedding[...])
    assert not padded.embed.embedding[...][VOCAB:].any()
    config = tiny_config(data=dict(context=T))
    batch = tiny_batch(config)

    def loss(model):
        graph, params = nnx.split(model)
        run = jax.value_and_grad(lambda p: lm(nnx.merge(graph, p), batch, None, z_loss=0.1)[0])
        return jax.jit(run)(params)

    (want, slope), (same, _) = loss(plain), loss(padded)
    padded.embed.embedding.set_value(padded.embed.embedding[...].at[VOCAB:].set(3.0))
    if head == "untied":
        padded.head.kernel.set_value(padded.head.kernel[...].at[:, VOCAB:].set(3.0))
    found, other = loss(padded)
    np.testing.assert_allclose([same, found], want, rtol=1e-6)
    for path, g in nnx.to_flat_state(other):
        g, w = g[...], dict(nnx.to_flat_state(slope))[path][...]
        g, rest = (g[:, : w.shape[1]], g[:, w.shape[1] :]) if path[0] == "head" else (g[: len(w)], g[len(w) :])
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())
        assert not np.any(rest)


@pytest.mark.parametrize("policy", ["none", "dots", "full", "names", "offload"])
def test_remat_keeps_what_it_says_and_changes_nothing(policy):
    def saved(**model):
        graph, params = nnx.split(drawn(dropout=0.1, hidden=40, attention_impl="plain", **model))
        tokens, key = jnp.arange(4 * T).reshape(4, T) % VOCAB, jax.random.key(0)
        f = lambda p: jnp.sum(nnx.merge(graph, p)(tokens, key=key)[0] ** 2)  # noqa: E731
        kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(f, p)[1], params))]
        run = (lambda p: jax.vjp(f, p)[1](1.0)[0]) if policy != "offload" else None
        return kept, run and jax.jit(run)(params)

    kept, slope = saved(remat=policy, remat_names="query,product" if policy == "names" else "")
    product, query, stream = (2, 4, T, 40), (2, 4, T, 4, 4), (2, 4, T, 16)
    assert stream in kept
    assert (product in kept) == (policy in ("none", "dots", "names"))
    assert (query in kept) == (policy in ("none", "names"))
    if slope is not None:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slope, saved(remat="none")[1])


def test_layers_unrolled_are_layers_scanned():
    tokens = jnp.arange(2 * T).reshape(2, T)
    looped, flat = drawn(), drawn(scan_layers=False)
    run = jax.jit(lambda t: (looped(t)[0], flat(t)[0]))
    np.testing.assert_allclose(*run(tokens), rtol=1e-5, atol=1e-6)
    count = lambda m: sum(e.primitive.name == "dot_general" for e in equations(jax.make_jaxpr(m)(tokens).jaxpr))  # noqa: E731
    assert "while" in jax.jit(lambda t: looped(t)[0]).lower(tokens).as_text()
    assert count(looped) == count(flat) and "while" not in jax.jit(lambda t: flat(t)[0]).lower(tokens).as_text()
