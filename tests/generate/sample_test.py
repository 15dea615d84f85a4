"""Sampling against a slow reference, by frequencies, and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.generate.sample import restrict, sample

V = 7
restrict_jit = jax.jit(restrict)
sample_jit = jax.jit(sample)


def keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def slow_kept(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Walk down from the likeliest id until k ids or the mass p are there."""
    order = sorted((i for i in range(len(logits)) if np.isfinite(logits[i])), key=lambda i: (-logits[i], i))
    order = order[: top_k or None]
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    kept, mass = set(), 0.0
    for i, share in zip(order, weights / weights.sum(), strict=True):
        if mass >= top_p and top_p < 1:
            break
        kept.add(i)
        mass += share
    return kept


# Few values give many ties; no p is a mass that a set can have exactly, where rounding would decide.
@given(
    st.lists(st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=V, max_size=V).filter(
        lambda x: np.isfinite(x).any()
    ),
    st.integers(0, V + 2),
    st.sampled_from([1e-6, 0.1234, 0.5123, 0.8765, 0.98765, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_restrict_keeps_what_a_slow_walk_keeps(logits, top_k, top_p):
    logits = np.array(logits, np.float32)
    result = np.asarray(restrict_jit(logits[None], top_k, top_p))[0]
    kept = np.flatnonzero(np.isfinite(result))
    assert set(kept.tolist()) == slow_kept(logits, top_k, top_p)
    assert np.array_equal(result[kept], logits[kept])


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 1e-9), (0, 0.5), (2, 0.999)])
def test_equal_logits_keep_no_more_than_asked(top_k, top_p):
    kept = np.isfinite(restrict(jnp.zeros((1, 8)), top_k, top_p))[0]
    count = min(top_k or 8, max(1, int(np.ceil(8 * top_p))))
    assert kept.tolist() == [True] * count + [False] * (8 - count)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.3, 4, 0.8)]
)
def test_frequencies(temperature, top_k, top_p):
    logits = np.array([0.3, -1.0, 2.0, 1.5, -3.0, 0.0, 1.0], np.float32)
    n = 20_000
    ids = sample_jit(np.tile(logits, (n, 1)), keys(n), temperature=temperature, top_k=top_k, top_p=top_p)
    kept = sorted(slow_kept(logits / temperature, top_k, top_p))
    expected = np.zeros(V)
    expected[kept] = np.exp(logits[kept] / temperature)
    expected /= expected.sum()
    got = np.bincount(np.asarray(ids), minlength=V) / n
    assert got[expected == 0].sum() == 0
    assert np.abs(got - expected).max() < 5 * (0.25 / n) ** 0.5


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-30])
def test_cold_takes_the_first_of_the_likeliest(temperature):
    logits = jnp.array([[0.0, 5.0, 4.9, -1.0], [2.0, -jnp.inf, 2.5, 2.5]])
    ids = sample_jit(logits, keys(2), temperature=temperature, top_k=0, top_p=1.0)
    assert ids.dtype == jnp.int32 and ids[0] == 1
    assert int(ids[1]) == 2 if temperature == 0 else int(ids[1]) in (2, 3)


def test_minus_infinity_is_never_drawn():
    logits = jnp.full((500, 5), -jnp.inf).at[:, 2:4].set(0.0)
    for top_k, top_p in [(0, 1.0), (4, 1.0), (0, 0.999)]:
        ids = sample_jit(logits, keys(500), temperature=50.0, top_k=top_k, top_p=top_p)
        assert set(np.asarray(ids).tolist()) == {2, 3}


def test_a_row_depends_on_its_own_key_only():
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    settings = dict(temperature=1.0, top_k=20, top_p=0.9)
    together = sample_jit(logits, keys(6), **settings)
    alone = [int(sample_jit(logits[i : i + 1], keys(6)[i : i + 1], **settings)[0]) for i in range(6)]
    assert together.tolist() == alone
    assert sample_jit(logits, keys(6, seed=3), **settings).tolist() != alone


def test_settings_are_traced():
    draw = jax.jit(lambda *args, **settings: sample(*args, **settings))  # a cache of its own
    logits = np.zeros((3, V), np.float32)
    for temperature, top_k, top_p in [(0.0, 0, 1.0), (0.7, 3, 0.5), (1.5, 1, 0.1)]:
        draw(logits, keys(3), temperature=temperature, top_k=top_k, top_p=top_p)
    assert draw._cache_size() == 1
