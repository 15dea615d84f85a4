"""The chunked cross entropy against plain log-softmax in NumPy float64 and plain autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.losses import classify, cross_entropy, lm, mixed, mlm, token_scores
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


class Encoder(nnx.Module):
    """As much of a masked language model as `mlm` needs."""

    vocab = V

    def __init__(self, rng):
        self.table, self.kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((V + 1, D), (D, V)))

    def __call__(self, tokens, **_):
        return self.table[tokens]

    def head_kernel(self):
        return self.kernel


def test_mlm_reads_the_disguised_tokens_and_scores_the_true_ones(rng):
    model = Encoder(rng)
    tokens, targets, mask = rng.integers(0, V + 1, (B, T)), rng.integers(0, V, (B, T)), rng.integers(0, 2, (B, T))
    ones = jnp.ones((B, T), jnp.int32)
    batch = dict(tokens=tokens, targets=targets, mask=mask, segments=ones, positions=ones)
    total, sums = mlm(model, {k: jnp.asarray(v) for k, v in batch.items()}, None, chunk=3)
    logits = np.asarray(model.table, np.float64)[tokens] @ np.asarray(model.kernel, np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert float(total) == pytest.approx((mask * nll).sum(), rel=1e-5) == float(sums["nll"])
    assert float(sums["correct"]) == (mask * (logits.argmax(-1) == targets)).sum()
    assert float(sums["weight"]) == mask.sum() > 0


def pictures(rng, b=6, size=8):
    images = rng.integers(0, 256, (b, size, size, 3), dtype=np.uint8)
    batch = dict(
        images=images, labels=rng.integers(0, 4, b).astype(np.int32), mask=np.array([1] * (b - 1) + [0], np.int32)
    )
    return {k: jnp.asarray(v) for k, v in batch.items()}


def sees_means(images, key=None):
    """Four logits of an image that tell how it was scaled."""
    return jnp.mean(images, (1, 2)) @ jnp.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classify_is_the_cross_entropy_of_scaled_images(rng, smoothing):
    batch = pictures(rng)
    total, sums = classify(sees_means, batch, None, mean=0.4, std=0.2, label_smoothing=smoothing, mixup=1.0, cutmix=1.0)
    images, labels, mask = (np.asarray(batch[k], np.float64) for k in ("images", "labels", "mask"))
    logits = ((images / 255 - 0.4) / 0.2).mean((1, 2)) @ np.arange(12.0).reshape(3, 4)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hot = np.eye(4)[labels.astype(int)]
    wanted = -((1 - smoothing) * hot + smoothing / 4) * log_p
    assert float(total) == pytest.approx((mask[:, None] * wanted).sum(), rel=1e-5)
    assert float(sums["nll"]) == pytest.approx(-(mask[:, None] * hot * log_p).sum(), rel=1e-5)
    assert float(sums["correct"]) == (mask * (logits.argmax(-1) == labels)).sum() and float(sums["weight"]) == 5


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.4, 0.8)])
def test_images_are_mixed_with_the_one_before_by_the_share_that_is_told(mixup, cutmix):
    """Each image has a grey of its own, so that what is in the mixture can be read off."""
    b, size = 64, 16
    greys = np.arange(b, dtype=np.float32)
    images = jnp.broadcast_to(greys[:, None, None, None], (b, size, size, 1))
    kinds = set()
    for seed in range(8):
        out, kept = jax.jit(mixed, static_argnums=(2, 3))(images, jax.random.key(seed), mixup, cutmix)
        out, kept, before = np.asarray(out)[..., 0], np.asarray(kept), np.roll(greys, 1)
        pasted = all(np.isin(image, [own, other]).all() for image, own, other in zip(out, greys, before, strict=True))
        kinds.add(pasted)
        np.testing.assert_allclose(out.mean((1, 2)), kept * greys + (1 - kept) * before, rtol=1e-4, atol=1e-3)
        assert kept.min() >= 0 and kept.max() <= 1 and kept.std() > 0.1
        if pasted:  # one rectangle each
            for image, own in zip(out, greys, strict=True):
                rows, columns = np.nonzero(image != own)
                assert len(rows) == (len(set(rows)) * len(set(columns)) if len(rows) else 0)
    assert kinds == ({True, False} if mixup and cutmix else {bool(cutmix)})


def test_targets_are_mixed_as_the_images_are(rng):
    """A model that reads the mixture off the image has the smallest loss that the mixed targets leave."""
    batch = pictures(rng, b=8)
    key = jax.random.key(3)
    _, mix = jax.random.split(key)
    _, kept = mixed(jnp.zeros((8, 8, 8, 3)), mix, 1.0, 0.0)
    hot = np.eye(4)[np.asarray(batch["labels"])]
    targets = np.asarray(kept)[:, None] * hot + (1 - np.asarray(kept))[:, None] * np.roll(hot, 1, 0)
    logits = jnp.log(jnp.asarray(targets) + 1e-6)
    total, _ = classify(lambda images, key: logits, batch, key, mean=0.5, std=0.5, mixup=1.0)
    entropy = -(targets * np.log(targets + 1e-6)).sum(-1)
    assert float(total) == pytest.approx((entropy * np.asarray(batch["mask"])).sum(), abs=1e-4)
    assert entropy.max() > 0.3


@pytest.mark.parametrize(("chunk", "dtype"), [(1, "float32"), (3, "bfloat16"), (100, "float32")])
def test_scores_of_tokens(rng, chunk, dtype):
    hidden, kernel, targets, _ = make(rng, dtype)
    vocab = V - 2  # the columns behind are padding, and are made the largest
    kernel, targets = kernel.at[:, vocab:].set(9.0), targets % vocab
    exact = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)[:, :vocab]
    targets = jnp.where(rng.random((B, T)) < 0.5, exact.argmax(-1), targets)
    log_p, likeliest = jax.jit(partial(token_scores, chunk, vocab))(hidden, kernel, targets)
    right = np.take_along_axis(exact, np.asarray(targets)[..., None], -1)[..., 0] - np.log(np.exp(exact).sum(-1))
    np.testing.assert_allclose(log_p, right, rtol=1e-5, atol=1e-5)
    assert (likeliest == (exact.argmax(-1) == targets)).all() and 0 < likeliest.sum() < likeliest.size
    assert log_p.dtype == "float32"


def test_of_equally_likely_tokens_the_first_counts():
    hidden, kernel = jnp.ones((1, 3, 2)), jnp.ones((2, 4)).at[:, 3].set(0.0)
    log_p, likeliest = token_scores(2, 4, hidden, kernel, jnp.array([[0, 1, 3]]))
    assert likeliest.tolist() == [[True, False, False]]
    np.testing.assert_allclose(log_p[0, :2], -np.log(3 + np.exp(-2.0)), rtol=1e-6)


def test_logits_of_all_tokens_never_exist(rng):
    hidden, kernel, targets, _ = make(rng, "bfloat16")
    for chunk in (1, 3, 4):
        shapes = float32_shapes(partial(token_scores, chunk, V), hidden, kernel, targets)
        pieces = -(-T // chunk)
        assert (B, -(-T // pieces), V) in shapes and (B, T, V) not in shapes
