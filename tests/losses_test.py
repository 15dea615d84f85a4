"""The chunked cross entropy against plain log-softmax in NumPy float64 and plain autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.losses import cross_entropy, lm
from aether.testing import drawn_model, equations, tiny_batch, tiny_config

B, T, D, V = 3, 7, 5, 11


def make(rng, dtype="float32"):
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(rng.normal(size=(D, V)), dtype)
    mask = (rng.random((B, T)) < 0.6) * rng.uniform(0.5, 2.0, (B, T))
    return hidden, kernel, jnp.asarray(rng.integers(0, V, (B, T))), jnp.asarray(mask, jnp.float32)


def wanted(z_loss, hidden, kernel, targets, mask):
    """The three results, and the gradients of the first for hidden and kernel, in float64."""
    hidden, kernel, mask = (np.asarray(a, np.float64) for a in (hidden, kernel, mask))
    logits = hidden @ kernel
    log_z = np.log(np.exp(logits).sum(-1))
    hot = np.eye(V)[np.asarray(targets)]
    nll = (mask * (log_z - (logits * hot).sum(-1))).sum()
    p = np.exp(logits - log_z[..., None])
    d_logits = mask[..., None] * (p - hot + 2 * z_loss * log_z[..., None] * p)
    total = nll + z_loss * (mask * log_z**2).sum()
    right = (mask * (logits.argmax(-1) == np.asarray(targets))).sum()
    return (total, nll, right), (d_logits @ kernel.T, np.einsum("btd,btv->dv", hidden, d_logits))


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.0), (3, 0.1), (4, 0.0), (7, 0.1), (100, 0.0)])
def test_is_log_softmax(rng, chunk, z_loss):
    args = make(rng)

    def f(hidden, kernel):
        total, *rest = cross_entropy(chunk, z_loss, V, hidden, kernel, *args[2:])
        return total, rest

    (total, rest), grads = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*args[:2])
    sums, slopes = wanted(z_loss, *args)
    np.testing.assert_allclose([total, *rest], sums, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(chunk, z_loss, V, *args), sums, rtol=1e-5)  # the path without gradients
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad, slope, atol=1e-5 * np.abs(slope).max())


def test_the_gradient_scales_with_the_cotangent(rng):
    args = make(rng)
    f = lambda h, factor: factor * cross_entropy(3, 0.1, V, h, *args[1:])[0]  # noqa: E731
    once, thrice = (jax.jit(jax.grad(f))(args[0], factor) for factor in (1.0, 3.0))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5)


def test_bfloat16_operands_with_float32_sums(rng):
    args = make(rng, "bfloat16")
    run = jax.jit(jax.value_and_grad(lambda h, k: cross_entropy(3, 0.1, V, h, k, *args[2:])[0], (0, 1)))
    total, grads = run(*args[:2])
    (right, *_), slopes = wanted(0.1, *args)
    assert total.dtype == "float32"
    np.testing.assert_allclose(total, right, rtol=1e-4)  # the operands are exact: only the sums round
    for grad, slope in zip(grads, slopes, strict=True):
        assert grad.dtype == "bfloat16"
        assert np.linalg.norm(np.asarray(grad, float) - slope) <= 1e-2 * np.linalg.norm(slope)


def float32_shapes(f, *args):
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return {v.aval.shape for e in equations(jaxpr) for v in e.outvars if v.aval.dtype == "float32"}


def test_logits_of_the_whole_batch_never_exist(rng):
    args = make(rng, "bfloat16")
    for chunk in (1, 3, 4):
        f = lambda h, k: cross_entropy(chunk, 0.1, V, h, k, *args[2:])[0]  # noqa: B023, E731
        shapes = float32_shapes(jax.grad(f, (0, 1)), *args[:2])
        rows = [int(np.prod(s)) // V for s in shapes if s and s[-1] == V and s != (D, V)]
        assert rows and max(rows) <= B * chunk
    whole = float32_shapes(jax.grad(lambda h: cross_entropy(T, 0.1, V, h, *args[1:])[0]), args[0])
    assert (B, T, V) in whole  # the search can find it


@pytest.mark.parametrize("kind", ["aether", "gpt2"])
def test_lm_scores_the_next_token_where_the_mask_says(kind):
    config = tiny_config(kind)
    model, batch = drawn_model(config), tiny_batch(config)

    @jax.jit
    def both(batch):
        inputs = {k: batch[k][:, :-1] for k in ("tokens", "segments", "positions")}
        hidden, _ = model(inputs["tokens"], segments=inputs["segments"], positions=inputs["positions"])
        return lm(model, batch, None, chunk=3, z_loss=0.01), model.logits(hidden)

    (total, sums), logits = both(batch)
    logits = np.asarray(logits, float)
    log_z = np.log(np.exp(logits).sum(-1))
    targets, mask = batch["tokens"][:, 1:], batch["mask"]
    nll = (mask * (log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0])).sum()
    np.testing.assert_allclose(sums["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(total, nll + 0.01 * (mask * log_z**2).sum(), rtol=1e-5)
    assert sums["weight"] == mask.sum() and sums["correct"] == (mask * (logits.argmax(-1) == targets)).sum()


def test_the_model_s_float32_logits_never_exist_in_training():
    config = tiny_config(model=dict(dtype="bfloat16"), data=dict(context=12))
    model, batch = drawn_model(config), tiny_batch(config)
    graph, params = nnx.split(model)
    loss = partial(lm, chunk=4)
    shapes = float32_shapes(jax.grad(lambda p: loss(nnx.merge(graph, p), batch, None)[0]), params)
    rows = config.model.rows
    assert (8, 4, rows) in shapes and (8, 12, rows) not in shapes
