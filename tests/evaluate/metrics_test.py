"""Scores against sums in float64 over a full softmax, with ragged masks, on one device and eight."""

import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from aether.config import MeshConfig
from aether.evaluate.metrics import scorer_of, summarise
from aether.parallel import make_mesh, shardings
from aether.testing import VOCAB, tiny_batch, tiny_config, tiny_model

LENGTHS = np.arange(VOCAB, dtype=np.int32) % 4  # some ids stand for no byte


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    return config, nnx.split(tiny_model(config)), [tiny_batch(config, step) for step in range(3)]


def by_hand(graph, params, batches):
    network = nnx.merge(graph, params)
    nats = right = tokens = size = 0.0
    for batch in batches:
        inputs = {k: batch[k][:, :-1] for k in ("tokens", "segments", "positions")}
        hidden, _ = network(inputs["tokens"], segments=inputs["segments"], positions=inputs["positions"])
        logits = np.asarray(hidden @ network.head_kernel()[:, :VOCAB], np.float64)
        targets, mask = batch["tokens"][:, 1:], batch["mask"]
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        nats += (nll * mask).sum()
        right += ((logits.argmax(-1) == targets) * mask).sum()
        tokens += mask.sum()
        size += (LENGTHS[targets] * mask).sum()
    return nats, right, tokens, size


def scores_of(model, mesh, z_loss=0.0):
    config, (graph, params), batches = model
    config = replace(config, train=replace(config.train, z_loss=z_loss))
    score = scorer_of(config, SimpleNamespace(token_bytes=LENGTHS), graph, mesh)
    return score(jax.device_put(params, shardings(params, mesh)), batches)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_scores(model, mesh):
    _, (graph, params), batches = model
    nats, right, tokens, size = by_hand(graph, params, batches)
    found = scores_of(model, make_mesh(mesh) if mesh else make_mesh(MeshConfig(), jax.devices()[:1]))
    assert found["tokens"] == tokens < 3 * 8 * 8, "masks are ragged"
    assert found["loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / tokens)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_the_z_loss_is_no_part_of_a_score(model):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert scores_of(model, mesh, z_loss=0.5)["loss"] == scores_of(model, mesh)["loss"]


def test_nothing_to_score(model):
    config, (graph, params), _ = model
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = scorer_of(config, SimpleNamespace(token_bytes=LENGTHS), graph, mesh)(params, [])
    assert found == dict(loss=0.0, perplexity=1.0, bits_per_byte=None, accuracy=0.0, tokens=0)


def test_what_is_not_finite_does_not_overflow():
    assert summarise(dict(nll=1e6, correct=0, weight=1, bytes=1))["perplexity"] == math.exp(700)
    assert math.isnan(summarise(dict(nll=math.nan, correct=0, weight=1, bytes=1))["perplexity"])
    assert math.isnan(summarise(dict(nll=math.inf, correct=0, weight=1, bytes=1))["perplexity"])
