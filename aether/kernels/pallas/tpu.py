"""Flash attention for TPUs in Pallas (Mosaic), forward and backward, with every ⵟ score and every structured mask.

A tile of scores is (key, query), so that whatever belongs to a query, its level, its sum, ‖q‖², is a row of lanes: sums
over keys are additions of registers, and nothing is stored with one number a row of 128 lanes. The backward pass is one
kernel, where the usual two compute the scores twice: gradients of queries are finished while their block stays, those
of keys and values accumulate in VMEM for all queries of a key head. Keys too many for VMEM are taken in parts, each of
which gives a summand of the queries' gradient. Tiles that causality or the window excludes are neither fetched nor
computed.

Idea of the online softmax and of recomputation: Dao et al., 2022, arXiv 2205.14135. Axes: as in `blockwise`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import body, tile
from aether.kernels.pallas.blocks import Blocks, blocks_of
from aether.kernels.pallas.device import device
from aether.kernels.pallas.operands import FACTOR, Operands, Plan, operands_of, pad
from aether.kernels.pallas.work import work
from aether.kernels.scores import Score, YatScore

Axis = Literal["parallel", "arbitrary"]
WIDEST = 256
_FAR = 1e30  # level of queries that fill up a block: their weights are 0


def unsupported(q: Array, k: Array, v: Array) -> str:
    """Return "" if there is a kernel for such operands, else what it does not do, as one clause."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype}"
    for width in (k.shape[-1], v.shape[-1]):
        if width % 8 or not 0 < width <= WIDEST:
            return f"heads of width {width}, only multiples of 8 up to {WIDEST}"
    return ""


def forward(
    q: Array,
    k: Array,
    v: Array,
    score: Score,
    mask: Mask,
    normalization: Normalization,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Return y (b, g, r, t, width of v) and the final level (b, g, r, t, 1), which `backward` takes.

    The level is that of `Normalization.final_level`, but for softmax in powers of two: log₂ Σ eˢ. To convert it would
    round it, and with it the weights of large scores.
    """
    o = operands_of(q, k, v, score, mask, normalization, blocks or _blocks(q, k, v, mask, False))
    (b, g, r, t, _), width, p = q.shape, v.shape[-1], o.plan
    rows = p.blocks.rows
    grid = (b, g, r, p.row_blocks, p.steps(p.column_blocks))

    def column(b: Any, g: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        return p.column(i, step, offset[0])

    def row(b: Any, g: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        return i

    wide = p.row_blocks * rows
    y, level = _call(
        o,
        partial(body.forward, p),
        grid=grid,
        row=row,
        column=column,
        outputs={
            "y": (jax.ShapeDtypeStruct((b, g, r, width, wide), v.dtype), _columnwise(width, rows, row)),
            "level": (jax.ShapeDtypeStruct((b, g, r, 1, wide), jnp.float32), _columnwise(1, rows, row)),
        },
        scratch={"mean": (width, rows), "top": (1, rows), "total": (1, rows)},
        semantics=(*("parallel",) * 4, "arbitrary"),
        cost=_cost(q, k, v, mask, p)[0],
        interpret=interpret,
    )
    return y[..., :t].swapaxes(-1, -2), level[..., :t].swapaxes(-1, -2)


def backward(
    q: Array,
    k: Array,
    v: Array,
    score: Score,
    mask: Mask,
    normalization: Normalization,
    level: Array,
    centre: Array,
    g: Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Score]:
    """Return the gradients of q, k, v and of the score's numbers, for the level, Σ g·y a query, and g = dL/dy."""
    o = operands_of(q, k, v, score, mask, normalization, blocks or _blocks(q, k, v, mask, True))
    p, (b, heads, r, t, _) = o.plan, q.shape
    rows, more = p.blocks.rows, p.row_blocks * p.blocks.rows - t
    o.arrays.update(
        g=pad(g.astype(v.dtype), -2, more),
        level=pad(level.swapaxes(-1, -2), -1, more, _FAR),
        centre=pad(centre.swapaxes(-1, -2), -1, more),
    )
    steps = p.steps(p.held)

    def column(b: Any, g: Any, c: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        return p.column(i, step, offset[0], c)

    def row(b: Any, g: Any, c: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        return i

    def of_rows(size: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = (p.parts, b, heads, r, size, p.row_blocks * rows)
        spec = pl.BlockSpec((None,) * 4 + (size, rows), lambda b, g, c, r, i, step, _: (c, b, g, r, 0, i))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def of_keys(size: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = (b, heads, p.parts * p.blocks.held, size)
        spec = pl.BlockSpec((None, None, p.blocks.held, size), lambda b, g, c, r, i, step, _: (b, g, c, 0))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    outputs = {"dq": of_rows(q.shape[-1]), "dk": of_keys(k.shape[-1]), "dv": of_keys(v.shape[-1])}
    if p.form.yat:
        outputs["sums"] = of_rows(4)
    dq, dk, dv, *sums = _call(
        o,
        partial(body.backward, p),
        grid=(b, heads, p.parts, r, p.row_blocks, steps),
        row=row,
        column=column,
        outputs=outputs,
        scratch={},
        semantics=(*("parallel",) * 3, *("arbitrary",) * 3),
        cost=_cost(q, k, v, mask, p)[1],
        interpret=interpret,
    )
    dq = jnp.sum(dq, 0)[..., :t].swapaxes(-1, -2)
    factor = o.parameters[FACTOR].reshape(heads, r, 1, 1)
    if isinstance(score, YatScore):
        total = jnp.sum(sums[0], 0)[..., :t]
        if p.form.squares:
            dq -= 0.5 * total[..., 1, :, None] * q.astype(jnp.float32)
        bias, _, alpha, epsilon = jnp.sum(total, (0, -1)).reshape(-1, 4).T
        by_head, root = factor.reshape(-1), math.sqrt(q.shape[-1])
        score = tile.of_numbers(score, by_head * bias, alpha / (4.0 * root), -0.25 * by_head * epsilon)
    s = k.shape[-2]
    return (dq * factor).astype(q.dtype), dk[:, :, :s].astype(k.dtype), dv[:, :, :s].astype(v.dtype), score


def _blocks(q: Array, k: Array, v: Array, mask: Mask, backward: bool) -> Blocks:
    sizes = q.shape[-2], k.shape[-2], max(k.shape[-1], v.shape[-1]), q.dtype.itemsize
    return blocks_of(device().kind, *sizes, window=mask.window, backward=backward)


def _cost(q: Array, k: Array, v: Array, mask: Mask, p: Plan) -> tuple[pl.CostEstimate, pl.CostEstimate]:
    b, g, r, t, width = q.shape
    one = work(
        b,
        g * r,
        g,
        t,
        k.shape[-2],
        width,
        v.shape[-1],
        q.dtype,
        causal=mask.causal,
        window=mask.window,
        offset=mask.offset if isinstance(mask.offset, int) else 0,
        blocks=(p.blocks.rows, p.blocks.columns),
    )
    return tuple(  # type: ignore[return-value]
        pl.CostEstimate(flops=w.flops, transcendentals=w.exponentials, bytes_accessed=w.hbm_bytes) for w in one
    )


def _columnwise(size: int, rows: int, row: Callable[..., Any]) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, size, rows), lambda b, g, r, *at: (b, g, r, 0, row(b, g, r, *at)))


def _call(
    o: Operands,
    kernel: Callable[..., None],
    *,
    grid: tuple[int, ...],
    row: Callable[..., Any],
    column: Callable[..., Any],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: dict[str, tuple[int, int]],
    semantics: tuple[Axis, ...],
    cost: pl.CostEstimate,
    interpret: bool,
) -> list[Array]:
    """Run `kernel(refs)` over the grid, whose first two axes are b and g, and whose last three are r, i and a step."""
    rows, columns, _, vmem = o.plan.blocks

    def spec(name: str, x: Array) -> pl.BlockSpec:
        size = x.shape[-1]
        if name in ("q", "g"):
            return pl.BlockSpec((None, None, None, rows, size), lambda *at: (*at[:2], at[-4], row(*at), 0))
        if name in ("square", "level", "centre"):
            return pl.BlockSpec((None, None, None, 1, rows), lambda *at: (*at[:2], at[-4], 0, row(*at)))
        if name in ("k", "v"):
            return pl.BlockSpec((None, None, columns, size), lambda *at: (*at[:2], column(*at), 0))
        if name == "query_segments":
            return pl.BlockSpec((None, 1, rows), lambda *at: (at[0], 0, row(*at)))
        return pl.BlockSpec((None, 8, columns), lambda *at: (at[0], 0, column(*at)))

    names = ["offset", "parameters", *o.arrays, *outputs, *scratch]
    run = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *(spec(n, x) for n, x in o.arrays.items())],
            out_specs=[s for _, s in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem),
        cost_estimate=cost,
        interpret=interpret,
    )
    return run(o.offset, o.parameters, *o.arrays.values())
