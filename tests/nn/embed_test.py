"""The ⵟ table: what is looked up, what `attend` compares, and the parameters."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.nn.embed import YatEmbed
from tools import reference

OPTIONS = {
    "plain": ({}, {}),
    "spherical": (dict(spherical=True),) * 2,
    "normalized": (dict(weight_normalized=True),) * 2,
    "both": (dict(spherical=True, weight_normalized=True),) * 2,
    "scaled": (dict(alpha_init=2.0, epsilon=0.3, learnable_epsilon=True), dict(alpha=2.0, epsilon=0.3)),
    "constant": (dict(constant_alpha=True, distance="exact"), dict(alpha=2**0.5)),
    "biased": (dict(use_bias=True, softplus_bias=True, bias_init=0.5, use_alpha=False), dict(bias=0.5)),
}


def make(**kwargs):
    return YatEmbed(7, 6, **kwargs, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", OPTIONS)
def test_attend_and_its_gradients_are_the_formula(rng, name):
    ours, theirs = OPTIONS[name]
    embed = make(**ours)
    embed.embedding[...] = 3.0 * embed.embedding[...]  # as after training: rows are not unit vectors
    q, g = rng.normal(size=(2, 3, 6)).astype(np.float32), rng.normal(size=(2, 3, 7))
    graph, params = nnx.split(embed)

    @jax.jit
    def run(params, q):
        def loss(params, q):
            y = nnx.merge(graph, params).attend(q)
            return jnp.sum(y * g), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, q)

    (of_params, of_q), y = run(params, q)
    args = q, np.asarray(embed.embedding[...])
    want = reference.attend(*args, **theirs)
    assert np.linalg.norm(y - want) <= 1e-5 * np.linalg.norm(want)
    grads = reference.gradient(lambda q, table: reference.attend(q, table, **theirs), args, g)
    for got, (grad, size) in zip((of_q, of_params["embedding"][...]), grads, strict=True):
        assert np.linalg.norm(got - grad) <= 1e-5 * np.linalg.norm(size)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(of_params))


def test_parameters_carry_the_names_and_axes_of_the_field():
    state = nnx.to_flat_state(nnx.state(make(learnable_epsilon=True, use_bias=True)))
    assert {path[-1]: (v[...].shape, v.get_metadata()["axes"]) for path, v in state} == {
        "embedding": ((7, 6), ("vocab", "embed")),
        "bias": ((7,), ("vocab",)),
        "alpha": ((1,), (None,)),
        "epsilon_param": ((1,), (None,)),
    }
    assert [path[-1] for path, _ in nnx.to_flat_state(nnx.state(make(constant_alpha=True)))] == ["embedding"]


def test_rows_start_near_unit_length_or_as_asked():
    rows = np.linalg.norm(YatEmbed(64, 256, rngs=nnx.Rngs(0)).embedding[...], axis=1)
    assert abs(rows.mean() - 1.0) < 0.02
    assert (make(embedding_init=nnx.initializers.ones).embedding[...] == 1).all()


def test_looks_rows_up():
    embed, ids = make(), jnp.array([[1, 3], [6, -1]], jnp.int16)
    table = np.asarray(embed.embedding[...])
    np.testing.assert_array_equal(embed(ids), table[np.asarray(ids)])
    assert jnp.isnan(embed(jnp.array([7]))).all()
    half = make(dtype="bfloat16", weight_normalized=True)
    assert half(ids).dtype == "bfloat16" and half.attend(jnp.ones(6)).dtype == "bfloat16"
    np.testing.assert_allclose(half(ids), half.embedding[...][ids], rtol=1e-2)  # rows keep their lengths


def test_attend_takes_one_vector_and_half_precision(rng):
    q = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    np.testing.assert_allclose(make().attend(q[1]), make().attend(q)[1], rtol=1e-6)
    np.testing.assert_allclose(make(dtype="bfloat16").attend(q), make().attend(q), rtol=0.1, atol=1e-2)


def test_the_table_is_never_transposed_nor_copied():
    embed = YatEmbed(512, 6, rngs=nnx.Rngs(0))
    text = jax.jit(embed.attend).lower(jnp.ones((2, 6))).as_text()
    assert "transpose" not in text


def test_bad_input_is_named():
    embed = make()
    for ids in (jnp.ones(2), jnp.ones(2, bool)):
        with pytest.raises(ValueError, match=f"ids are {ids.dtype}"):
            embed(ids)
    with pytest.raises(ValueError, match=r"q is \(2, 5\) and features is 6"):
        embed.attend(jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="q is int32"):
        embed.attend(jnp.ones((2, 6), jnp.int32))
    for options, said in (
        (dict(epsilon=0.0), "epsilon is 0.0"),
        (dict(distance="near"), "distance is 'near'"),
        (dict(use_bias=True, constant_bias=1.0, softplus_bias=True), "constant_bias is 1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            make(**options)
    with pytest.raises(ValueError, match="num_embeddings is 0; it must be an integer"):
        YatEmbed(0, 6, rngs=nnx.Rngs(0))


def test_equals_nmn_before_training(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("nmn.nnx", reason="the [parity] extra installs nmn to compare with").YatEmbed
    q, ids = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), jnp.array([1, 3])
    shared = dict(epsilon=0.1, constant_alpha=2.0)
    for options in ({}, dict(spherical=True), dict(weight_normalized=True)):
        other = theirs(7, 6, **shared, **options, rngs=nnx.Rngs(1))
        embed = make(**shared, **options)
        embed.embedding[...] = other.embedding[...]
        np.testing.assert_allclose(embed.attend(q), other.attend(q), rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(embed(ids), other(ids), rtol=2e-6)


def test_nmn_forgets_to_normalise_once_the_table_has_moved(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("nmn.nnx", reason="the [parity] extra installs nmn to compare with").YatEmbed
    q = rng.normal(size=(2, 6)).astype(np.float32)
    other, embed = theirs(7, 6, weight_normalized=True, rngs=nnx.Rngs(1)), make(weight_normalized=True)
    moved = 3.0 * other.embedding[...]
    embed.embedding[...] = other.embedding[...] = moved
    want = reference.attend(q, moved, weight_normalized=True)
    np.testing.assert_allclose(embed.attend(q), want, rtol=1e-4)
    assert np.abs(other.attend(q) - want).max() > 0.1 * np.abs(want).max()
