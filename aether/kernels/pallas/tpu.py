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
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import tile
from aether.kernels.pallas.blocks import Blocks, blocks_of
from aether.kernels.pallas.device import device
from aether.kernels.pallas.work import work
from aether.kernels.scores import DotScore, Score, YatScore

WIDEST = 256
_FACTOR, _CONSTANT = 0, 1  # rows of the numbers a head
_FAR = 1e30  # level of queries that fill up a block: their weights are 0
_inverse = partial(pl.reciprocal, full_range=False)  # without the operations that only 0, ∞ and denormals need


def unsupported(q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization) -> str:
    """Return "" if there is a kernel for this, else what it does not do, as one clause."""
    if not isinstance(score, DotScore | YatScore):
        return f"score {type(score).__name__}"
    if isinstance(score, YatScore) and score.distance != "expanded":
        return f"distance={score.distance!r}"
    if normalization.name not in ("softmax", "l1"):
        return f"normalization={normalization.name!r}"
    if mask.dense is not None:
        return "a dense mask"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype}"
    for width in (k.shape[-1], v.shape[-1]):
        if width % 8 or not 0 < width <= WIDEST:
            return f"heads of width {width}, only multiples of 8 up to {WIDEST}"
    return ""


class Plan(NamedTuple):
    """What is known when a kernel is built: sizes, the form of scores, the structure of the mask."""

    form: tile.Form
    blocks: Blocks
    keys: int
    row_blocks: int
    column_blocks: int
    causal: bool
    window: int | None
    segments: bool
    valid: bool

    @property
    def parts(self) -> int:
        """Return in how many parts the backward pass takes the keys."""
        return math.ceil(self.column_blocks / self.held)

    @property
    def held(self) -> int:
        """Return the key blocks of a part."""
        return self.blocks.held // self.blocks.columns

    def steps(self, most: int) -> int:
        """Return how many key blocks a query block visits of `most` neighbouring ones."""
        if self.window is None:
            return most
        return min(most, (self.blocks.rows + self.window - 3) // self.blocks.columns + 2)

    def span(self, i: Array, offset: Array) -> tuple[Array | int, Array | int]:
        """Return the first key block that query block `i` sees and the one after the last."""
        if not self.causal and self.window is None:
            return 0, self.column_blocks
        row, columns = i * self.blocks.rows + offset, self.blocks.columns
        last = jnp.minimum(jax.lax.div(row + (self.blocks.rows - 1), columns) + 1, self.column_blocks)
        if self.window is None:
            return 0, last
        return jax.lax.div(jnp.maximum(row - (self.window - 1), 0), columns), last


class Operands(NamedTuple):
    """Arrays as the kernels take them, padded to whole blocks."""

    plan: Plan
    offset: Array
    parameters: Array
    arrays: dict[str, Array]


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
    """Return y (b, g, r, t, width of v) and the final level (b, g, r, t, 1), as the blockwise form does."""
    o = _operands(q, k, v, score, mask, normalization, blocks or _blocks(q, k, v, mask, False))
    (b, g, r, t, _), width, p = q.shape, v.shape[-1], o.plan
    rows = p.blocks.rows
    grid = (b, g, r, p.row_blocks, p.steps(p.column_blocks))

    def column(b: Any, g: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        return jnp.clip(p.span(i, offset[0])[0] + step, 0, jnp.maximum(p.span(i, offset[0])[1], 1) - 1)

    def row(b: Any, g: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        return i

    wide = p.row_blocks * rows
    y, level = _call(
        o,
        partial(_forward_kernel, p),
        grid=grid,
        row=row,
        column=column,
        outputs={
            "y": (jax.ShapeDtypeStruct((b, g, r, width, wide), v.dtype), _columnwise(width, rows, row)),
            "level": (jax.ShapeDtypeStruct((b, g, r, 1, wide), jnp.float32), _columnwise(1, rows, row)),
        },
        scratch={"mean": (width, rows), "top": (1, rows), "total": (1, rows)},
        semantics=("parallel",) * 4 + ("arbitrary",),
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
    y: Array,
    level: Array,
    g: Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Score]:
    """Return the gradients of q, k, v and of the score's numbers, for the gradient `g` of y."""
    o = _operands(q, k, v, score, mask, normalization, blocks or _blocks(q, k, v, mask, True))
    centre = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), -1)
    p, (b, heads, r, t, _) = o.plan, q.shape
    rows, more = p.blocks.rows, p.row_blocks * p.blocks.rows - t
    o.arrays.update(
        g=_pad(g.astype(v.dtype), -2, more),
        level=_pad(level.swapaxes(-1, -2) * p.form.unit, -1, more, _FAR),
        centre=_pad(centre[..., None, :], -1, more),
    )
    steps = p.steps(p.held)

    def column(b: Any, g: Any, c: Any, r: Any, i: Any, step: Any, offset: Any) -> Any:
        first, last = _part(p, c, *p.span(i, offset[0]))
        return jnp.clip(first + step, 0, jnp.maximum(last, 1) - 1)

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
        partial(_backward_kernel, p),
        grid=(b, heads, p.parts, r, p.row_blocks, steps),
        row=row,
        column=column,
        outputs=outputs,
        scratch={},
        semantics=("parallel",) * 3 + ("arbitrary",) * 3,
        cost=_cost(q, k, v, mask, p)[1],
        interpret=interpret,
    )
    dq = jnp.sum(dq, 0)[..., :t].swapaxes(-1, -2)
    factor = o.parameters[_FACTOR].reshape(heads, r, 1, 1)
    if sums:
        total = jnp.sum(sums[0], 0)[..., :t]
        if p.form.squares:
            dq -= 0.5 * total[..., 1, :, None] * q.astype(jnp.float32)
        score = _of_numbers(score, jnp.sum(total, (0, -1)), factor, q.shape[-1])
    s = k.shape[-2]
    return (dq * factor).astype(q.dtype), dk[:, :, :s].astype(k.dtype), dv[:, :, :s].astype(v.dtype), score


def _blocks(q: Array, k: Array, v: Array, mask: Mask, backward: bool) -> Blocks:
    sizes = q.shape[-2], k.shape[-2], max(k.shape[-1], v.shape[-1]), q.dtype.itemsize
    return blocks_of(device().kind, *sizes, window=mask.window, backward=backward)


def _operands(
    q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization, blocks: Blocks
) -> Operands:
    (t, width), s, heads = q.shape[-2:], k.shape[-2], q.shape[1] * q.shape[2]
    plan = Plan(
        tile.form_of(score, normalization.name == "softmax", q.dtype),
        blocks,
        s,
        math.ceil(t / blocks.rows),
        math.ceil(s / blocks.columns),
        mask.causal,
        mask.window,
        mask.query_segments is not None,
        mask.valid is not None,
    )
    more, over = plan.row_blocks * blocks.rows - t, plan.column_blocks * blocks.columns - s
    q, k, v = _pad(q, -2, more), _pad(k, -2, over), _pad(v, -2, over)
    arrays = {"q": q, "k": k, "v": v}
    if plan.form.squares:
        arrays["square"] = jnp.sum(jnp.square(q.astype(jnp.float32)), -1)[..., None, :]
    if mask.query_segments is not None:
        arrays["query_segments"] = _pad(mask.query_segments.astype(jnp.int32), -1, more)[:, None]
    rows = [mask.key_segments, mask.valid]
    if rows != [None, None]:
        zeros = jnp.zeros((q.shape[0], s), jnp.int32)
        told = [zeros if a is None else a.astype(jnp.int32) for a in rows] + [zeros] * 6
        arrays["marks"] = _pad(jnp.stack(told, 1), -1, over)
    alpha = score.alpha if isinstance(score, YatScore) else 1.0
    numbers = [alpha / math.sqrt(width), normalization.constant]
    if isinstance(score, YatScore):
        numbers += [score.bias, score.epsilon]
    parameters = jnp.stack([jnp.broadcast_to(jnp.asarray(n, jnp.float32).reshape(-1), (heads,)) for n in numbers])
    return Operands(plan, jnp.asarray(mask.offset, jnp.int32).reshape(1), parameters, arrays)


def _pad(x: Array, axis: int, n: int, value: float = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, n)
    return jnp.pad(x, widths, constant_values=value) if n else x


def _of_numbers(score: Any, sums: Array, factor: Array, width: int) -> Any:
    """Return the gradients of b, α and ε, for sums (g, r, 4) of `tile.Slopes`, in the shapes of the numbers."""
    bias, _, alpha, epsilon = sums.reshape(-1, 4).T
    factor = factor.reshape(-1)
    named = {"bias": factor * bias, "alpha": alpha / (4.0 * math.sqrt(width)), "epsilon": -0.25 * factor * epsilon}
    shapes = {name: jnp.shape(getattr(score, name)) for name in named}
    return replace(
        score,
        **{n: (jnp.sum(a) if math.prod(shapes[n]) == 1 else a).reshape(shapes[n]) for n, a in named.items()},
    )


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


def _part(p: Plan, c: Any, first: Any, last: Any) -> tuple[Any, Any]:
    """Return what part `c` of the keys has of the blocks first … last − 1."""
    if p.parts == 1:
        return first, last
    return jnp.maximum(first, c * p.held), jnp.minimum(last, (c + 1) * p.held)


def _call(
    o: Operands,
    kernel: Callable[..., None],
    *,
    grid: tuple[int, ...],
    row: Callable[..., Any],
    column: Callable[..., Any],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: dict[str, tuple[int, int]],
    semantics: tuple[str, ...],
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


def _compare(p: Plan, refs: dict[str, Any], head: Any, i: Any, j: Any) -> tuple[tile.Pairs, Array]:
    """Return pairs (key, query) of query block i and key block j, and their scores; hidden ones are -∞ or 0."""
    k, numbers = refs["k"][...], refs["parameters"]
    factor = numbers[_FACTOR, head] * (p.form.unit / (4.0 if p.form.yat else 2.0))
    q, squares, told = refs["q"][...], (1.0, 1.0), tile.Head(0.0, 0.0, factor)
    if p.form.yat:
        told = tile.Head(2.0 * numbers[2, head], numbers[3, head], factor)
    if p.form.squares:
        squares = (refs["square"][...], jnp.sum(jnp.square(k.astype(jnp.float32)), -1, keepdims=True))
    pairs = tile.compare(p.form, _product(k, q + q, 1, 1), squares, told, _inverse)
    return pairs, tile.hide(p.form, pairs.u * factor, _seen(p, refs, i, j))


def _seen(p: Plan, refs: dict[str, Any], i: Any, j: Any) -> Array | None:
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


def _product(x: Array, w: Array, of_x: int, of_w: int) -> Array:
    """Return the product over these axes of two matrices, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, w, (((of_x,), (of_w,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _forward_kernel(p: Plan, refs: dict[str, Any]) -> None:
    i, step = pl.program_id(3), pl.program_id(4)
    head = pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)
    first, last = p.span(i, refs["offset"][0])
    mean, top, total = refs["mean"], refs["top"], refs["total"]

    @pl.when(step == 0)
    def _start() -> None:
        mean[...] = jnp.zeros(mean.shape, jnp.float32)
        top[...] = jnp.full(top.shape, tile.LOW, jnp.float32)
        none = 0.0 if p.form.softmax else refs["parameters"][_CONSTANT, head]
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
        mean[...] += _product(v, weights.astype(v.dtype), 0, 0)

    @pl.when(step == pl.num_programs(4) - 1)
    def _end() -> None:
        whole = total[...]
        if p.form.softmax:
            some = whole > 0
            whole = jnp.where(some, whole, 1.0)
            refs["level"][...] = jnp.where(some, top[...] / tile.LOG2E + jnp.log(whole), 0.0)
        else:
            refs["level"][...] = whole
        refs["y"][...] = (mean[...] / whole).astype(refs["y"].dtype)


def _backward_kernel(p: Plan, refs: dict[str, Any]) -> None:
    c, r, i, step = (pl.program_id(n) for n in range(2, 6))
    head = pl.program_id(1) * pl.num_programs(3) + r
    first, last = _part(p, c, *p.span(i, refs["offset"][0]))
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
        slopes = tile.pull(p.form, slope * (_product(v, g, 1, 1) - refs["centre"][...]), pairs)
        of_dot = slopes.dot.astype(k.dtype)
        of_k = _product(of_dot, q, 1, 0)
        if p.form.squares:
            of_k -= 0.5 * jnp.sum(slopes.square, 1, keepdims=True) * k.astype(jnp.float32)
        at = pl.ds(pl.multiple_of((j - c * p.held) * columns, columns), columns)
        refs["dk"][at, :] += of_k * refs["parameters"][_FACTOR, head]
        refs["dv"][at, :] += _product(weights.astype(v.dtype), g, 1, 0)
        refs["dq"][...] += _product(k, of_dot, 0, 0)
        if p.form.yat:
            for n, x in enumerate(slopes[1:]):
                refs["sums"][n : n + 1, :] += jnp.sum(x, 0, keepdims=True)
