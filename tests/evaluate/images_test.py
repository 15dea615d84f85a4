"""Scores of a classifier against NumPy, over masked batches and several devices; the mistakes it is surest of."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import MeshConfig, Pictures, build
from aether.evaluate.images import BINS, Mistakes, image_sums, summarise_images
from aether.evaluate.metrics import scorer_of, summer
from aether.parallel import make_mesh, shardings

CLASSES, BATCH, SIDE = 7, 16, 4


class Linear(nnx.Module):
    """Logits of the flattened image."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((SIDE * SIDE, CLASSES)), axes=(None, None))

    def __call__(self, images, key=None):
        assert key is None, "a score is no training"
        return images.reshape(len(images), -1) @ self.kernel[...]


@pytest.fixture(scope="module")
def made():
    """Config, graph, parameters, three batches (the last of them padded), and their logits in float64."""
    rng = np.random.default_rng(0)
    c = build(dict(model=dict(kind="resnet"))).resolved(0, Pictures(CLASSES, SIDE, 1, 0.4, 0.3))
    kernel = rng.normal(size=(SIDE * SIDE, CLASSES))
    model = Linear()
    model.kernel[...] = jnp.asarray(kernel, jnp.float32)
    batches, logits = [], []
    for count in (BATCH, BATCH, 5):
        images = rng.integers(0, 256, (BATCH, SIDE, SIDE, 1), dtype=np.uint8)
        scores = ((images / 255.0 - 0.4) / 0.3).reshape(BATCH, -1) @ kernel
        labels = np.where(rng.random(BATCH) < 0.4, scores.argmax(-1), rng.integers(0, CLASSES, BATCH)).astype(np.int32)
        batches.append(dict(images=images, labels=labels, mask=(np.arange(BATCH) < count).astype(np.int32)))
        logits.append(scores)
    return SimpleNamespace(config=c, split=nnx.split(model), batches=batches, logits=logits)


def by_hand(made):
    """The scores, counted image by image."""
    p, labels = [], []
    for batch, logits in zip(made.batches, made.logits, strict=True):
        keep = batch["mask"] > 0
        e = np.exp(logits - logits.max(-1, keepdims=True))
        p.append((e / e.sum(-1, keepdims=True))[keep])
        labels.append(batch["labels"][keep])
    p, labels = np.concatenate(p), np.concatenate(labels)
    n = np.arange(len(p))
    guess, sure = p.argmax(-1), p.max(-1)
    places = (p > p[n, labels][:, None]).sum(-1)
    error = 0.0
    for k in range(BINS):
        inside = (sure >= k / BINS) & ((sure < (k + 1) / BINS) | (k == BINS - 1))
        if inside.any():
            error += inside.mean() * abs((guess == labels)[inside].mean() - sure[inside].mean())
    confusion = np.zeros((CLASSES, CLASSES))
    np.add.at(confusion, (labels, guess), 1)
    top5 = (places < 5).mean()
    assert top5 < 1
    scores = dict(
        loss=-np.log(p[n, labels]).mean(), accuracy=(guess == labels).mean(), top5=top5, calibration_error=error
    )
    return scores | dict(images=len(p)), confusion, (guess, sure, labels)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=4, fsdp=2)])
def test_every_image_counts_once_whatever_the_devices(made, mesh):
    mesh = make_mesh(mesh) if mesh else make_mesh(MeshConfig(), jax.devices()[:1])
    graph, params = made.split
    params = jax.device_put(params, shardings(params, mesh))
    wanted, confusion, _ = by_hand(made)
    found = scorer_of(made.config, None, graph, mesh)(params, made.batches)
    assert found == pytest.approx(wanted, abs=1e-5) and found["images"] == 2 * BATCH + 5
    mistakes = Mistakes()
    sums = summer(graph, image_sums(made.config, rows=True), mesh, mistakes)(params, made.batches)
    assert summarise_images(sums) == pytest.approx(wanted, abs=1e-5)
    np.testing.assert_array_equal(sums["confusion"], confusion)
    assert len(mistakes.worst) == confusion.sum() - confusion.trace()


def test_training_asks_for_the_sums_alone(made):
    graph, params = made.split
    sums = summer(graph, image_sums(made.config), make_mesh(MeshConfig(), jax.devices()[:1]))(params, made.batches)
    assert set(sums) == {"nll", "correct", "top5", "weight", "bins"}


def test_nothing_to_score():
    assert set(summarise_images({}).values()) == {0.0}


def scored(made, logits, labels):
    """Sums and rows of images with these logits."""
    count = len(labels)
    batch = dict(images=jnp.ones((count, SIDE, SIDE, 1), jnp.uint8), labels=jnp.asarray(labels), mask=jnp.ones(count))
    return jax.jit(lambda x: image_sums(made.config, rows=True)(lambda images: x, batch))(jnp.asarray(logits))


def test_equal_logits_are_guessed_in_order(made):
    found = scored(made, np.full((CLASSES, CLASSES), 0.7, np.float32), np.arange(CLASSES))
    assert (found["correct"], found["top5"]) == (1, 5), "not all of them"
    np.testing.assert_array_equal(found["rows"]["guess"], 0)


def test_logits_that_are_not_numbers_are_wrong(made):
    logits = np.random.default_rng(0).normal(size=(4, CLASSES)).astype(np.float32)
    logits[1, 2], logits[2], logits[3, 0] = np.nan, np.nan, np.inf
    logits[0, 6] = -np.inf  # a class that is never guessed is no fault
    labels = np.array([logits[0].argmax(), 2, 0, 0])
    found = scored(made, logits, labels)
    assert (found["correct"], found["top5"], found["weight"]) == (1, 1, 4)
    np.testing.assert_array_equal(found["rows"]["guess"], [labels[0], -1, -1, -1])
    np.testing.assert_array_equal(found["rows"]["confidence"][1:], 0.0)
    assert found["confusion"].sum() == found["bins"][2].sum() == 1 and found["bins"][0].sum() == 4


def test_bins_are_summed_in_full_precision(made):
    """A TPU's own precision would round each confidence to eight bits."""
    batch = jax.tree.map(jnp.asarray, made.batches[0])
    model = nnx.merge(*made.split)
    sums = jax.make_jaxpr(lambda batch: image_sums(made.config)(model, batch))(batch)
    dots = [e for e in sums.eqns if e.primitive.name == "dot_general" and e.outvars[0].aval.shape == (3, BINS)]
    assert [e.params["precision"] for e in dots] == [(jax.lax.Precision.HIGHEST,) * 2]


def test_the_surest_mistakes_are_kept_in_order(made):
    graph, params = made.split
    mistakes = Mistakes(keep=6)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    summer(graph, image_sums(made.config, rows=True), mesh, mistakes)(params, made.batches)
    _, _, (guess, sure, labels) = by_hand(made)
    wrong = np.flatnonzero(guess != labels)
    order = wrong[np.argsort(-sure[wrong])][:6]
    assert [(m.label, m.guess) for m in mistakes.worst] == [(labels[i], guess[i]) for i in order]
    np.testing.assert_allclose([m.confidence for m in mistakes.worst], sure[order], rtol=1e-4)
    images = np.concatenate([b["images"][b["mask"] > 0] for b in made.batches])
    np.testing.assert_array_equal([m.image for m in mistakes.worst], images[order])
    assert all(m.image.base is None for m in mistakes.worst), "a view keeps its batch"
