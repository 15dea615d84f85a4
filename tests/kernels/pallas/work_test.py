"""The work that the kernels state, against counting tile by tile, and against what XLA counts for whole scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.attention import DotScore, plain
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas.work import work


@pytest.mark.parametrize("offset", [0, 24])
@pytest.mark.parametrize("told", [dict(), dict(causal=True), dict(window=1), dict(window=20), dict(window=33)])
def test_tiles_are_those_in_which_a_pair_is_seen(told, offset):
    t, s, rows, columns = 64, 88, 16, 8
    p, j = offset + np.arange(t)[:, None], np.arange(s)
    seen = np.ones((t, s), bool) if not told else (j <= p) & (j > p - told.get("window", s + t))
    tiles = seen.reshape(t // rows, rows, s // columns, columns).any((1, 3)).sum()
    forward, backward = work(2, 4, 2, t, s, 32, 16, jnp.bfloat16, **told, offset=offset, blocks=(rows, columns))
    pairs = 2 * 4 * tiles * rows * columns
    assert forward.exponentials == backward.exponentials == pairs
    assert forward.flops == 2 * pairs * 48 and backward.flops == 2 * pairs * (96 + 32)


def test_flops_are_xla_s_where_nothing_is_left_out():
    b, g, r, t, s, k = 1, 2, 2, 128, 256, 64
    q, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, g, r, t, k), (b, g, s, k)))
    f = lambda q, k, v: plain(q, k, v, DotScore(), Mask(), Normalization())  # noqa: E731
    counted = jax.jit(f).lower(q, x, x).compile().cost_analysis()["flops"]
    forward, _ = work(b, g * r, g, t, s, k, k, jnp.float32, blocks=(128, 128))
    assert forward.flops <= counted <= 1.1 * forward.flops


def test_bytes_are_at_least_those_of_the_operands_and_grow_with_the_tiles():
    sizes = (1, 4, 4, 1024, 1024, 128, 128, jnp.bfloat16)
    operand = 4 * 1024 * 128 * 2
    (once, back), (often, _) = (work(*sizes, blocks=(rows, 256)) for rows in (1024, 128))
    assert once.hbm_bytes == 4 * operand + 4 * 4 * 1024  # q, k, v, y and the levels
    assert often.hbm_bytes == once.hbm_bytes + 7 * 2 * operand
    assert back.hbm_bytes > 2 * once.hbm_bytes - operand
