"""Attention in memory linear in the length: blocks of scores, made when needed and made again for the gradient.

The forward pass keeps a running level, sum and weighted mean for each query (Milakov and Gimelshein, 2018; Rabe and
Staats, 2021, arXiv 2112.05682); the backward pass has the operands, the output and one level a query (Dao et al., 2022,
arXiv 2205.14135), and differentiates each block's scores by `jax.vjp`, so that any score function will do. Blocks that
causality or the window excludes are never visited. Second derivatives need the plain form.

Axes: as in `aether.kernels.attention`: q (b, g, r, t, k), k and v (b, g, s, k).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.yat import product


def _compare(score: Any, q: Array, k: Array) -> Array:
    """Return the scores (b, g, r, t, s) of q (b, g, r, t, k) and k (b, g, s, k)."""
    if q.shape[2] == 1:  # an axis of 1 would cost the products up to a third on CPU
        return score(q[:, :, 0], k)[:, :, None]
    return score(q, k[:, :, None])


def _average(weights: Array, v: Array) -> Array:
    """Return Σ_s w_s v_s in float32, (b, g, r, t, k), for weights (b, g, r, t, s) and v (b, g, s, k)."""
    return product("bgms,bgsk->bgmk", _rows(weights.astype(v.dtype)), v).reshape(*weights.shape[:-1], v.shape[-1])


def _rows(x: Array) -> Array:
    """Join the axes r and t."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


class Plan(NamedTuple):
    """The size of a block, how many there are, and how many keys are real."""

    rows: int
    columns: int
    row_blocks: int
    column_blocks: int
    keys: int


def blockwise(q: Array, k: Array, v: Array, score: Any, mask: Mask, normalization: Normalization, block: int) -> Array:
    """Attend block by block: the same as `aether.kernels.attention.plain` up to rounding, gradients too."""
    t, s = q.shape[-2], k.shape[-2]
    (rows, row_blocks), (columns, column_blocks) = _even(t, block), _even(s, block)
    plan = Plan(rows, columns, row_blocks, column_blocks, s)
    more_t, more_s = rows * row_blocks - t, columns * column_blocks - s
    mask = mask.padded(more_t, more_s)
    q, k, v = _pad(q, more_t), _pad(k, more_s), _pad(v, more_s)
    score = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), score)
    return _blockwise(plan, q, k, v, score, normalization.by_head(*q.shape[1:3]), mask)[..., :t, :]


def _even(length: int, block: int) -> tuple[int, int]:
    """Return the size and number of equal blocks, none above `block`, that cover `length` with little to spare."""
    count = math.ceil(length / block)
    return math.ceil(length / count), count


def _pad(x: Array, n: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n), (0, 0)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(plan, q, k, v, score, n, mask):
    return _forward(plan, q, k, v, score, n, mask)[0]


def _forward(plan, q, k, v, score, n, mask):
    def one(_, x):
        i, q_i = x

        def add(j, carry):
            level, total, mean = carry
            k_j, v_j = _columns(plan, k, j), _columns(plan, v, j)
            s = n.hide(_compare(score, q_i, k_j), _seen(plan, mask, i, j))
            higher = jnp.maximum(level, jnp.max(s, -1, keepdims=True))
            w, shrink = n.weight(s, higher), n.weight(level, higher)
            mean = mean * shrink + _average(w, v_j)
            return higher, total * shrink + jnp.sum(w, -1, keepdims=True), mean

        mean = jnp.zeros((*q_i.shape[:-1], v.shape[-1]), jnp.float32)
        level, total, mean = jax.lax.fori_loop(*_span(plan, mask, i), add, (*n.start(mean[..., :1]), mean))
        return None, ((mean / jnp.where(total > 0, total, 1.0)).astype(v.dtype), n.final_level(level, total))

    _, outputs = jax.lax.scan(one, None, (jnp.arange(plan.row_blocks), _split(plan, q)))
    y, level = (_join(a) for a in outputs)
    return y, (q, k, v, score, n, mask, y, level)


def _backward(plan, residuals, g):
    q, k, v, score, n, mask, y, level = residuals
    centre = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)

    def one(sums, x):
        i, q_i, level_i, centre_i, g_i = x

        def add(j, carry):
            dq, dk, dv, dscore = carry
            k_j, v_j = _columns(plan, k, j), _columns(plan, v, j)
            s, pull = jax.vjp(_compare, score, q_i, k_j)
            s = n.hide(s, _seen(plan, mask, i, j))
            w = n.weight(s, level_i)
            dw = product("bgmk,bgsk->bgms", _rows(g_i), v_j).reshape(w.shape)
            of_score, of_q, of_k = pull(n.slope(s, level_i, w) * (dw - centre_i))
            of_v = product("bgms,bgmk->bgsk", _rows(w.astype(v.dtype)), _rows(g_i))
            at = j * plan.columns
            return dq + of_q, _add_at(dk, of_k, at), _add_at(dv, of_v, at), jax.tree.map(jnp.add, dscore, of_score)

        dq, *sums = jax.lax.fori_loop(*_span(plan, mask, i), add, (jnp.zeros(q_i.shape, jnp.float32), *sums))
        return tuple(sums), dq.astype(q.dtype)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32), jax.tree.map(jnp.zeros_like, score))
    blocks = (jnp.arange(plan.row_blocks), *(_split(plan, a) for a in (q, level, centre, g)))
    (dk, dv, dscore), dq = jax.lax.scan(one, start, blocks)
    return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), dscore, n.constant_gradient(level, centre), None


_blockwise.defvjp(_forward, _backward)


def _split(plan: Plan, x: Array) -> Array:
    """Bring the blocks of the query axis to the front."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], plan.row_blocks, plan.rows, x.shape[-1]), -3, 0)


def _join(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _columns(plan: Plan, x: Array, j: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, j * plan.columns, plan.columns, -2)


def _add_at(total: Array, part: Array, at: Array) -> Array:
    old = jax.lax.dynamic_slice_in_dim(total, at, part.shape[-2], -2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, at, -2)


def _span(plan: Plan, mask: Mask, i: Array) -> tuple[Array | int, Array | int]:
    return mask.span(i * plan.rows, plan.rows, plan.columns, plan.column_blocks)


def _seen(plan: Plan, mask: Mask, i: Array, j: Array) -> Array | None:
    """Return what block i of the queries sees of block j of the keys; keys that fill up the last block are hidden."""
    seen = mask.block(i * plan.rows, plan.rows, j * plan.columns, plan.columns)
    if plan.keys == plan.columns * plan.column_blocks:
        return seen
    real = j * plan.columns + jnp.arange(plan.columns) < plan.keys
    return real if seen is None else seen & real
