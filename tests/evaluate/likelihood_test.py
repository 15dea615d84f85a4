"""Log-likelihoods by batches on meshes, against one request at a time in float64."""

import jax
import numpy as np
import pytest
from flax import nnx

from aether.config import MeshConfig
from aether.evaluate.likelihood import Score, Scorer, _lengths
from aether.evaluate.load import load_run
from aether.evaluate.requests import Request
from aether.parallel import make_mesh

COUNTS = [(33, 32), (33, 1), (20, 5), (20, 19), (9, 8), (9, 1), (2, 1), (2, 1)]


def drawn(rng, counts=COUNTS):
    return [Request(rng.integers(0, 257, n).astype(np.int32), scored) for n, scored in counts]


def forward(run):
    """Return ids (t,) -> logits (t, v) of one request alone, without padding, on one device."""
    model = nnx.merge(run.graph, jax.device_put(run.params, jax.devices()[0]))
    logits = jax.jit(lambda ids: model.logits(model(ids)[0])[0])
    return lambda ids: np.asarray(logits(ids[None]), np.float64)


def reference(logits_of, requests):
    """Score each request alone, with log-softmax in float64."""
    found = []
    for r in requests:
        logits, targets = logits_of(r.ids[:-1])[-r.scored :], r.ids[-r.scored :]
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        likeliest = logits.argmax(-1) == targets
        found.append(Score(float(log_p[np.arange(r.scored), targets].sum()), bool(likeliest.all())))
    return found


def same(found, expected):
    np.testing.assert_allclose([s.log_p for s in found], [s.log_p for s in expected], rtol=2e-5, atol=2e-5)
    assert [s.greedy for s in found] == [s.greedy for s in expected]


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=1, fsdp=2, sequence=2, tensor=2)], ids=str)
def test_scores_are_those_of_one_request_at_a_time(bytes_run, rng, mesh):
    run = load_run(bytes_run, mesh=make_mesh(MeshConfig(**mesh)))
    logits_of, requests = forward(run), drawn(rng)
    for r in requests[:4]:  # what is drawn is never the likeliest
        requests.append(Request(np.append(r.ids[:-1], np.int32(logits_of(r.ids[:-1])[-1].argmax())), 1))
        requests.append(Request(requests[-1].ids, 2))
    expected = reference(logits_of, requests)
    assert [s.greedy for s in expected] == [False] * 8 + [True, False] * 4
    same(Scorer(run)(requests), expected)


def test_a_gpt2_with_learned_positions(write_bytes_run, tmp_path, rng):
    run = load_run(write_bytes_run(tmp_path, model=dict(kind="gpt2", layers=1)))
    requests = drawn(rng, [(33, 20), (9, 3)])
    same(Scorer(run)(requests), reference(forward(run), requests))


def test_neither_order_nor_company_matters(loaded, rng):
    requests, scorer = drawn(rng, COUNTS + [(n, 1) for n in range(2, 34)]), Scorer(loaded)
    together = scorer(requests)
    order = rng.permutation(len(requests))
    same(scorer([requests[i] for i in order]), [together[i] for i in order])
    same([scorer([r])[0] for r in requests[:4]], together[:4])
    assert scorer([]) == []


def test_equal_requests_are_scored_once(loaded, rng, monkeypatch):
    one, other = drawn(rng, [(9, 3), (9, 3)])
    shorter = Request(one.ids, 2)
    scorer, asked = Scorer(loaded), []
    monkeypatch.setattr(
        scorer, "_scored", lambda requests, name, f=scorer._scored: asked.extend(requests) or f(requests, name)
    )
    found = scorer([one, other, Request(one.ids.copy(), 3), shorter, other])
    assert len(asked) == 3 and found[0] == found[2] and found[1] == found[4] and len(set(found)) == 3


def test_batches_hold_equal_tokens_and_few_shapes(loaded, rng):
    scorer = Scorer(loaded)
    requests = drawn(rng, [(int(n), 1) for n in rng.integers(2, 34, 500)])
    batches = scorer.batches(requests)
    assert sorted(i for b in batches for i in b.members) == list(range(500))
    lengths = [len(requests[i].ids) - 1 for b in batches for i in b.members]
    assert lengths == sorted(lengths, reverse=True)
    assert all(b.rows * b.length == 8 * 32 for b in batches[:-1])
    assert all(b.rows % 8 == 0 and len(b.members) <= b.rows for b in batches)
    assert len({(b.rows, b.length) for b in batches}) <= 2
    (small,) = scorer.batches(requests[:3])
    assert small.rows == 8


def test_lengths_halve_down_to_the_shortest_and_divide_over_the_mesh():
    assert _lengths(1024, 1) == [1024, 512, 256, 128, 64, 32]
    assert _lengths(100, 1) == [100, 50, 25] and _lengths(16, 1) == [16]
    assert _lengths(96, 4) == [96, 48, 24] and _lengths(40, 8) == [40, 24]
    assert all(n % 8 == 0 for n in _lengths(1000, 8))
