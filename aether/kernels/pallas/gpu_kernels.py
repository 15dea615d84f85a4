"""The three kernels of flash ⵟ-attention on NVIDIA GPUs: the forward pass, and the gradients of q and of k and v.

Scores are (query, key) in the first two and (key, query) in the last, so that the product with weights has them on its
left, where tensor cores read registers. Blocks that are seen whole have a loop of their own, without booleans.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from aether.kernels.pallas import gpu_tile as tile
from aether.kernels.pallas.gpu_tile import Form, Refs, across, down
from aether.kernels.pallas.tile import LOW, hide, product

_FIRST: Any = np.int32(0)  # head of those that a program sees

Span = tuple[Array | int, Array | int, Array | int, Array | int]


def forward(f: Form, refs: Refs, y_ref: Any, level_ref: Any) -> None:
    """Write y and the final level of a block of queries."""
    i, numbers = pl.program_id(0), tile.numbers_of(refs, _FIRST)
    q = tile.load_queries(f, refs, _FIRST, i, True, down)

    def add(j: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
        level, total, mean = carry
        k = tile.load_keys(f, refs, j, edge, across)
        pairs = tile.compare(f, numbers, q, k, edge)
        w = hide(f, (numbers.alpha * f.unit) * pairs.ratio, pairs.seen)
        if f.softmax:
            higher = jnp.maximum(level, jnp.max(w, 1))
            w, shrink = tile.exp2(f, w - higher[:, None]), tile.exp2(f, level - higher)
            level, total, mean = higher, total * shrink, mean * shrink[:, None]
        return level, total + jnp.sum(w, 1), mean + product(w.astype(k.v.dtype), k.v, 1, 0)

    zeros = jnp.zeros((f.rows,), jnp.float32)
    start = (zeros + LOW, zeros, jnp.zeros(q.x.shape, jnp.float32))
    level, total, mean = _loop(span_of_queries(f, i, tile.offset_of(refs)), add, start)
    if f.softmax:
        some = total > 0
        total = jnp.where(some, total, 1.0)
        level = jnp.where(some, level + jnp.log2(total), 0.0)
    else:
        level = total = total + numbers.constant
    tile.save(y_ref, (_FIRST,), i * f.rows, mean / total[:, None], f.queries)
    tile.save(level_ref, (_FIRST,), i * f.rows, level, f.queries)


def of_queries(f: Form, refs: Refs, dq_ref: Any, sums_ref: Any = None) -> None:
    """Write dq of a block of queries, and what it adds to the gradients of b, α/√d and ε."""
    i, numbers = pl.program_id(0), tile.numbers_of(refs, _FIRST)
    q = tile.load_queries(f, refs, _FIRST, i, True, down)

    def add(j: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
        k = tile.load_keys(f, refs, j, edge, across)
        pairs = tile.compare(f, numbers, q, k, edge)
        _, e = tile.weigh(f, numbers, pairs, product(q.g, k.v, 1, 1), q)
        of_dot, et = tile.of_dot(f, numbers, pairs, e)
        dq = carry[0] + product(of_dot.astype(k.x.dtype), k.x, 1, 0)
        if not f.yat:
            return (dq,)
        terms = [et, e * pairs.ratio, et * pairs.t] + [et * pairs.free] * f.squares
        return dq, *(total + jnp.sum(term, 1) for total, term in zip(carry[1:], terms, strict=True))

    zeros = jnp.zeros((f.rows,), jnp.float32)
    start = (jnp.zeros(q.x.shape, jnp.float32), *[zeros] * (f.yat * (3 + f.squares)))

    dq, *sums = _loop(span_of_queries(f, i, tile.offset_of(refs)), add, start)
    factors: list[Array | float] = [2.0 * numbers.alpha, 1.0, -numbers.alpha]
    if f.squares:
        dq -= (2.0 * numbers.alpha * sums[3])[:, None] * q.x.astype(jnp.float32)
    tile.save(dq_ref, (_FIRST,), i * f.rows, dq, f.queries)
    for n, total in enumerate(sums[:3]):
        sums_ref[n] = factors[n] * jnp.sum(total)


def of_keys(f: Form, refs: Refs, dk_ref: Any, dv_ref: Any) -> None:
    """Write dk and dv of a block of keys, summed over the query heads that share it."""
    j = pl.program_id(0)
    k = tile.load_keys(f, refs, j, True, down)

    def of_head(head: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        numbers = tile.numbers_of(refs, head)

        def add(i: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
            q = tile.load_queries(f, refs, head, i, edge, across)
            pairs = tile.compare(f, numbers, q, k, edge)
            w, e = tile.weigh(f, numbers, pairs, product(k.v, q.g, 1, 1), q)
            of_dot, et = tile.of_dot(f, numbers, pairs, e)
            dk = carry[0] + product(of_dot.astype(q.x.dtype), q.x, 1, 0)
            dv = carry[1] + product(w.astype(q.g.dtype), q.g, 1, 0)
            return dk, dv, *(total + numbers.alpha * jnp.sum(et * pairs.free, 1) for total in carry[2:])

        return _loop(span_of_keys(f, j, tile.offset_of(refs)), add, carry)

    zeros = jnp.zeros(k.x.shape, jnp.float32)
    carry: tuple[Array, ...] = (zeros, zeros, *[jnp.zeros((f.columns,), jnp.float32)] * f.squares)
    heads = refs["q"].shape[0]
    dk, dv, *square = of_head(_FIRST, carry) if heads == 1 else jax.lax.fori_loop(0, heads, of_head, carry)
    if f.squares:
        dk -= (2.0 * square[0])[:, None] * k.x.astype(jnp.float32)
    tile.save(dk_ref, (), j * f.columns, dk, f.keys)
    tile.save(dv_ref, (), j * f.columns, dv, f.keys)


def span_of_queries(f: Form, i: Array, offset: Array | int) -> Span:
    """Return (first, a, b, last): the key blocks that query block i sees, of which a … b − 1 are seen whole."""
    count, whole = pl.cdiv(f.keys, f.columns), f.keys // f.columns
    if not f.causal and f.window is None:
        return 0, 0, whole, count
    low = i * f.rows + offset
    end = low + f.rows
    last = jnp.minimum(_floor(end + f.columns - 1, f.columns), count)
    b = jnp.minimum(_floor(low + 1, f.columns), whole)
    if f.window is None:
        return 0, 0, jnp.minimum(b, last), last
    first = jnp.minimum(_floor(low - f.window + 1, f.columns), last)
    a = jnp.clip(_floor(end - f.window + f.columns - 1, f.columns), first, last)
    return first, a, jnp.clip(b, a, last), last


def span_of_keys(f: Form, j: Array, offset: Array | int) -> Span:
    """Return (first, a, b, last): the query blocks that see key block j, of which a … b − 1 see it whole."""
    count, whole = pl.cdiv(f.queries, f.rows), f.queries // f.rows
    if not f.causal and f.window is None:
        return 0, 0, whole, count
    low = j * f.columns - offset
    end = low + f.columns
    first = jnp.minimum(_floor(low, f.rows), count)
    a = jnp.clip(_floor(end + f.rows - 2, f.rows), first, count)
    if f.window is None:
        return first, a, jnp.maximum(a, whole), count
    last = jnp.clip(_floor(end + f.window + f.rows - 2, f.rows), first, count)
    a, b = jnp.minimum(a, last), jnp.minimum(_floor(low + f.window, f.rows), whole)
    return first, a, jnp.clip(b, a, last), last


def _floor(x: Array, n: int) -> Array:
    """Return max(x, 0) // n."""
    return jax.lax.div(jnp.maximum(x, 0), jnp.int32(n))


def _loop(span: Span, add: Callable[..., Any], carry: Any) -> Any:
    """Add the blocks of a span, telling of each whether it is on an edge: seen in part."""
    for start, stop, edge in zip(span[:-1], span[1:], (True, False, True), strict=True):
        if not (isinstance(start, int) and isinstance(stop, int) and start == stop):
            carry = jax.lax.fori_loop(start, stop, lambda i, carry, edge=edge: add(i, carry, edge), carry)
    return carry
