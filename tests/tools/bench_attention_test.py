"""Contenders of one table compute the same, so that only their costs differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.attention import IMPLS
from tools import bench_attention
from tools.bench_attention import attend

FORMS = [impl for impl in ("plain", "blockwise", "auto") if impl in IMPLS]


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=(1, 48, 2, 64)), jnp.float32) for _ in range(3))


@pytest.mark.parametrize("impl", FORMS)
def test_dot_products_agree(qkv, impl):
    usual = jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="xla")
    np.testing.assert_allclose(attend("dot", impl)((), *qkv), usual, atol=1e-5)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("score", ["plain", "spherical"])
def test_scores_are_those_of_the_formula(qkv, rng, score, impl):
    params = {name: rng.uniform(0.4, 0.6, 2) for name in ("bias", "alpha", "epsilon")}
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    if score == "spherical":
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    dots = np.einsum("bthk,bshk->bhts", q, k)
    b, alpha, epsilon = (params[name][:, None, None] for name in ("bias", "alpha", "epsilon"))
    distance = np.sum((q[:, :, None] - k[:, None]) ** 2, -1).transpose(0, 3, 1, 2)
    scores = alpha * (dots + b) ** 2 / ((distance + epsilon) * 8)
    scores = np.where(np.tril(np.ones((48, 48), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
    single = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    np.testing.assert_allclose(attend(score, impl)(single, *qkv), wanted, atol=2e-4)


def test_rows_of_a_table():
    """Names are what --only selects by."""
    from types import SimpleNamespace

    from tools.bench_where import Where

    where = Where(jax.devices("cpu")[0], None, 2**30)
    args = SimpleNamespace(lengths=[64, 128], heads=2, dtype=None)
    titles, tables = zip(*bench_attention.tables(args, where), strict=True)
    assert titles[1] == "attention: length 128, 2 heads x 64, causal, float32"
    names = [c.name for c in tables[0]]
    assert names[0] == "dot product, XLA" and "ⵟ spherical, Aether blockwise" in names and len(names) == len(set(names))
