"""The bodies of the two TPU kernels: what happens to one tile of scores, (key, query), in VMEM."""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from aether.kernels.pallas import tile
from aether.kernels.pallas.operands import BIAS, CONSTANT, EPSILON, FACTOR, Plan

Refs = dict[str, Any]
_inverse = partial(pl.reciprocal, full_range=False)  # without the operations that only 0, ∞ and denormals need


def _compare(p: Plan, refs: Refs, head: Any, i: Any, j: Any) -> tuple[tile.Pairs, Array]:
    """Return pairs (key, query) of query block i and key block j, and their scores; hidden ones are -∞ or 0."""
    k, numbers = refs["k"][...], refs["parameters"]
    factor = numbers[FACTOR, head] * (p.form.unit / (4.0 if p.form.yat else 2.0))
    q, told = refs["q"][...], tile.Head(0.0, 0.0)
    squares: tuple[Any, Any] = (1.0, 1.0)
    if p.form.yat:
        told = tile.Head(2.0 * numbers[BIAS, head], numbers[EPSILON, head])
    if p.form.squares:
        squares = (refs["square"][...], jnp.sum(jnp.square(k.astype(jnp.float32)), -1, keepdims=True))
    pairs = tile.compare(p.form, tile.product(k, q + q, 1, 1), squares, told, _inverse)
    return pairs, tile.hide(p.form, pairs.u * factor, _seen(p, refs, i, j))


def _seen(p: Plan, refs: Refs, i: Any, j: Any) -> Array | None:
    rows, columns = p.blocks.rows, p.blocks.columns
    seen = []
    column = jax.lax.broadcasted_iota(jnp.int32, (columns, 1), 0)
    if p.causal or p.window is not None:
        row = jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1) + (i * rows + refs["offset"][0] - j * columns)
        seen.append(column <= row)
        if p.window is not None:
            seen.append(column > row - p.window)
    if p.segments or p.valid:
        marks = refs["marks"][...].T
        if p.segments:
            seen.append(marks[:, 0:1] == refs["query_segments"][...])
        if p.valid:
            seen.append(jnp.broadcast_to(marks[:, 1:2], (columns, rows)) != 0)
    if p.keys % columns:
        seen.append(column < p.keys - j * columns)
    return reduce(jnp.logical_and, seen) if seen else None


def forward(p: Plan, refs: Refs) -> None:
    """Take a step of the grid (b, g, r, query block, step) towards y, transposed, and the final levels."""
    i, step = pl.program_id(3), pl.program_id(4)
    head = pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)
    first, last = p.span(i, refs["offset"][0])
    mean, top, total = refs["mean"], refs["top"], refs["total"]

    @pl.when(step == 0)
    def _start() -> None:
        mean[...] = jnp.zeros(mean.shape, jnp.float32)
        top[...] = jnp.full(top.shape, tile.LOW, jnp.float32)
        none = 0.0 if p.form.softmax else refs["parameters"][CONSTANT, head]
        total[...] = jnp.full(total.shape, none, jnp.float32)

    @pl.when(first + step < last)
    def _add() -> None:
        _, weights = _compare(p, refs, head, i, first + step)
        if p.form.softmax:
            old = top[...]
            higher = jnp.maximum(old, jnp.max(weights, 0, keepdims=True))
            weights, shrink = jnp.exp2(weights - higher), jnp.exp2(old - higher)
            top[...] = higher
            total[...] *= shrink
            mean[...] *= shrink
        v = refs["v"][...]
        total[...] += jnp.sum(weights, 0, keepdims=True)
        mean[...] += tile.product(v, weights.astype(v.dtype), 0, 0)

    @pl.when(step == pl.num_programs(4) - 1)
    def _end() -> None:
        whole = total[...]
        if p.form.softmax:
            some = whole > 0
            whole = jnp.where(some, whole, 1.0)
            refs["level"][...] = jnp.where(some, top[...] + jnp.log2(whole), 0.0)
        else:
            refs["level"][...] = whole
        refs["y"][...] = (mean[...] / whole).astype(refs["y"].dtype)


def backward(p: Plan, refs: Refs) -> None:
    """Take a step of the grid (b, g, part of the keys, r, query block, step) towards all gradients."""
    c, r, i, step = (pl.program_id(n) for n in range(2, 6))
    head = pl.program_id(1) * pl.num_programs(3) + r
    first, last = p.span(i, refs["offset"][0], c)
    columns = p.blocks.columns

    @pl.when((step == 0) & (i == 0) & (r == 0))
    def _start_keys() -> None:
        @pl.loop(0, p.held)
        def _(n: Any) -> None:
            for name in ("dk", "dv"):
                at = pl.ds(pl.multiple_of(n * columns, columns), columns)
                refs[name][at, :] = jnp.zeros((columns, refs[name].shape[-1]), jnp.float32)

    @pl.when(step == 0)
    def _start_queries() -> None:
        for name in ("dq", "sums") if p.form.yat else ("dq",):
            refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)

    @pl.when(first + step < last)
    def _add() -> None:
        j = first + step
        q, k, v, g = (refs[name][...] for name in ("q", "k", "v", "g"))
        pairs, score = _compare(p, refs, head, i, j)
        weights, slope = tile.weigh(p.form, score, refs["level"][...], _inverse)
        slopes = tile.pull(p.form, slope * (tile.product(v, g, 1, 1) - refs["centre"][...]), pairs)
        of_dot = slopes.dot.astype(k.dtype)
        of_k = tile.product(of_dot, q, 1, 0)
        if p.form.squares and slopes.square is not None:
            of_k -= 0.5 * jnp.sum(slopes.square, 1, keepdims=True) * k.astype(jnp.float32)
        at = pl.ds(pl.multiple_of((j - c * p.held) * columns, columns), columns)
        refs["dk"][at, :] += of_k * refs["parameters"][FACTOR, head]
        refs["dv"][at, :] += tile.product(weights.astype(v.dtype), g, 1, 0)
        refs["dq"][...] += tile.product(k, of_dot, 0, 0)
        for n, x in enumerate(slopes[1:]):
            if x is not None:
                refs["sums"][n : n + 1, :] += jnp.sum(x, 0, keepdims=True)
