"""MiniBERT and BERT: against NumPy in float64, both directions, packed documents, the mask, sizes, the mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aether.config import SIZES, MeshConfig, ModelConfig
from aether.losses import cross_entropy
from aether.models import Bert
from aether.parallel import BATCH, make_mesh, shardings
from aether.testing import VOCAB, drawn_model, tiny_config
from tools import reference

T = 6
KINDS = ("minibert", "bert")


def drawn(kind, **model):
    return drawn_model(tiny_config(kind, model=model, data=dict(context=T)))


def exact(model):
    """Return the parameters by path, in float64."""
    return {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(model))}


def packed(rng):
    """Return tokens of two documents a row and padding, with segments and positions."""
    tokens = rng.integers(0, VOCAB + 1, (2, T))
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    return tokens, segments, positions


@pytest.mark.parametrize(("position", "head"), [("rotary", "tied"), ("learned", "untied")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_the_reference(rng, kind, position, head):
    model = drawn(kind, position=position, head=head)
    p, (tokens, segments, positions) = exact(model), packed(rng)
    gain = model.config.embed_std / 0.02 if head == "tied" else 1.0
    x = gain * p["embed/embedding"][tokens]
    x = x + p["position/embedding"][positions] if position == "learned" else x
    mask = segments[:, :, None] == segments[:, None]
    turned = positions if position == "rotary" else None
    hidden = reference.encoder(p, x, model.config.heads, mask=mask, positions=turned)
    want = hidden @ (p["head/kernel"] if head == "untied" else p["embed/embedding"].T)
    run = jax.jit(lambda t, s, q: model.logits(model(t, segments=s, positions=q)))
    got = run(*map(jnp.asarray, (tokens, segments, positions)))
    assert got.shape == (2, T, VOCAB) and got.dtype == "float32"
    assert np.abs(got - want[..., :VOCAB]).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("attention", ["yat", "yat_linear"])
def test_documents_see_all_of_themselves_and_nothing_else(rng, attention):
    """By gradient: hidden state t feels the embedding at s just if both are in one document, before it or after."""
    graph, params = nnx.split(drawn("minibert", attention=attention, epsilon=1.0))
    tokens, segments, positions = jnp.arange(T)[None], *(jnp.asarray(a[:1]) for a in packed(rng)[1:])

    def rows(params, cotangents):
        run = lambda p: nnx.merge(graph, p)(tokens, segments=segments, positions=positions)[0]  # noqa: E731
        _, back = jax.vjp(run, params)
        return jax.vmap(lambda g: back(g)[0]["embed"]["embedding"][...])(cotangents)

    cotangents = jnp.eye(T)[..., None] * rng.normal(size=(T, 16))
    felt = np.asarray(jax.jit(rows)(params, cotangents))[:, :T]
    np.testing.assert_array_equal(np.abs(felt).sum(-1) > 0, np.asarray(segments[0][:, None] == segments[0]))


@pytest.mark.parametrize("attention", ["dot", "yat_linear"])
def test_packed_documents_are_as_if_apart(rng, attention):
    model = drawn("minibert", attention=attention, epsilon=1.0)
    tokens, segments, positions = (jnp.asarray(a[:1]) for a in packed(rng))

    @jax.jit
    def both(tokens):
        return model(tokens, segments=segments, positions=positions), model(tokens[:, :3]), model(tokens[:, 3:5])

    whole, first, second = both(tokens)
    np.testing.assert_allclose(whole[:, :5], jnp.concatenate([first, second], 1), rtol=1e-3, atol=1e-4)


def test_the_mask_is_read_and_never_predicted():
    """The table has a row for it, which learns from being read; the logits and the loss know only the ids."""
    c = tiny_config("minibert").model
    model = jax.jit(lambda: nnx.state(Bert(c, T, nnx.Rngs(0))))()
    table = np.asarray(model["embed"]["embedding"][...])
    assert table.shape == (c.rows, 16) == (128, 16)
    assert table[: VOCAB + 1].std() == pytest.approx(0.02, rel=0.1) and table[VOCAB].any()
    assert not table[VOCAB + 1 :].any()
    graph, params = nnx.split(drawn("minibert"))
    tokens, targets = jnp.asarray([[3, VOCAB, 4, VOCAB, 5, 9]]), jnp.asarray([[3, 1, 4, 1, 5, 9]])

    def loss(params, weights):
        model = nnx.merge(graph, params)
        hidden = model(tokens)
        nll = cross_entropy(4, 0.0, model.vocab, hidden, model.head_kernel(), targets, weights)[0]
        return nll, jax.nn.log_softmax(model.logits(hidden))[0]

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (nll, scores), slope = both(params, jnp.asarray([[0.0, 1, 0, 1, 0, 0]]))
    assert float(nll) == pytest.approx(-float(scores[1, 1] + scores[3, 1]), rel=1e-5)
    rows = np.abs(slope["embed"]["embedding"][...]).max(-1)
    assert rows[VOCAB] > 0 and not rows[VOCAB + 1 :].any()


@pytest.mark.parametrize("size", SIZES["bert"])
def test_both_kinds_have_as_many_parameters(size):
    def count(kind):
        c = ModelConfig(kind=kind, size=size, vocab_multiple=1).resolved(30_521)  # and the mask
        state = nnx.state(nnx.eval_shape(lambda: Bert(c, 512, nnx.Rngs(0))))
        return sum(math.prod(v.shape) for _, v in nnx.to_flat_state(state)), c

    ours, c = count("minibert")
    usual, _ = count("bert")
    n, d, f = c.layers, c.width, c.hidden
    assert usual == 30_522 * d + n * (4 * d * (d + 1) + 2 * d * f + f + d + 4 * d) + 2 * d
    assert abs(ours / usual - 1) < 0.02


@pytest.mark.parametrize("attention", [pytest.param("yat", marks=pytest.mark.slow), "yat_linear"])
def test_the_mesh_changes_nothing(rng, attention):
    """Rows over data and fsdp, heads and vocabulary over tensor, and the gradients lie as their parameters."""
    graph, params = nnx.split(drawn("minibert", attention=attention, epsilon=1.0, embed_std=0.02))
    arrays = [jnp.asarray(np.concatenate([a, a])) for a in packed(rng)]

    def loss(params, tokens, segments, positions):
        model = nnx.merge(graph, params)
        return jnp.sum(jnp.sin(model.logits(model(tokens, segments=segments, positions=positions))))

    want, slope = jax.jit(jax.value_and_grad(loss))(params, *arrays)
    c = MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(c)
    where = shardings(params, mesh, c)
    spread = jax.device_put(params, where)
    assert spread["blocks"]["attention"]["query"]["kernel"][...].sharding.spec == P(None, "fsdp", "tensor")
    assert spread["embed"]["embedding"][...].sharding.spec == P("tensor", "fsdp")
    rows = [jax.device_put(a, NamedSharding(mesh, BATCH)) for a in arrays]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where))
        got, found = run(spread, *rows)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    largest = max(float(jnp.linalg.norm(a)) for a in jax.tree.leaves(slope))
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(found), strict=True):
        assert float(np.linalg.norm(a - b)) < 1e-3 * float(jnp.linalg.norm(a)) + 1e-4 * largest
