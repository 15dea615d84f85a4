"""What one program of flash ⵟ-attention does on an NVIDIA GPU: the forward pass, and the gradients of q and of k and v.

With n = q·k + b, Q = D + ε and t = n/Q the score is s = (α/√d) n t, ds/dn = 2 (α/√d) t and ds/dQ = −(α/√d) t². What is
done for each pair of query and key costs as much as the products, so it is written in instructions: what Triton makes of
`exp2` and a division has several more for numbers below 2⁻¹²⁶, and it contracts no product and sum. Scores are (query, key) in the first two kernels and (key, query) in the last, so that the product with
weights always takes them as its left operand, which tensor cores read from registers.

Key blocks that every query of a program sees whole are done in a loop of their own, without masks for causality.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOG2E = 1.4426950408889634
_LOW = -1e30  # stands for the maximum of no score
_FIRST = np.int32(0)  # head of those that a program sees


class Form(NamedTuple):
    """What a kernel is compiled for; lengths and block sizes are numbers of queries and of keys."""

    yat: bool
    spherical: bool
    floor: float
    softmax: bool
    causal: bool
    window: int | None
    queries: int
    keys: int
    rows: int
    columns: int
    interpret: bool

    @property
    def squares(self) -> bool:
        """Say whether scores need ‖q‖² and ‖k‖²."""
        return self.yat and not self.spherical


class Numbers(NamedTuple):
    """b, α/√d (1/√d of dot products), ε and ε₁ of one head."""

    bias: Array
    alpha: Array
    epsilon: Array
    constant: Array


class Block(NamedTuple):
    """What is loaded of a block of queries or keys; None where the form does not need it."""

    at: Array
    x: Array
    square: Array | None
    segment: Array | None
    valid: Array | None = None
    v: Array | None = None  # v of keys, dL/dy of queries
    level: Array | None = None
    centre: Array | None = None


class Scores(NamedTuple):
    """n²/Q (or q·k), t = n/Q, t where the distance is free and 0 elsewhere, and which pairs are seen."""

    ratio: Array
    t: Array
    free: Array
    seen: Array | None


def forward(f: Form, refs: dict[str, Any], y_ref: Any, level_ref: Any) -> None:
    """Write y and the final level of a block of queries."""
    i, numbers, offset = pl.program_id(0), _numbers(refs, _FIRST), _offset(f, refs)
    q, unit = _queries(f, refs, _FIRST, i, f.queries % f.rows != 0), LOG2E if f.softmax else 1.0

    def add(j: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
        level, total, mean = carry
        k = _keys(f, refs, j, edge)
        scores = _compare(f, numbers, offset, q, k, _down, _across, edge)
        s = _hide(f, (numbers.alpha * unit) * scores.ratio, scores.seen)
        if f.softmax:
            higher = jnp.maximum(level, jnp.max(s, 1))
            s, shrink = _exp2(f, s - higher[:, None]), _exp2(f, level - higher)
            level, total, mean = higher, total * shrink, mean * shrink[:, None]
        return level, total + jnp.sum(s, 1), mean + _product(s.astype(k.v.dtype), k.v, 1, 0)

    level, total = jnp.full((f.rows,), _LOW), jnp.zeros((f.rows,))
    mean = jnp.zeros((f.rows, refs["v"].shape[-1]), jnp.float32)
    level, total, mean = _loop(_span_of_queries(f, i, offset), add, (level, total, mean))
    if f.softmax:
        some = total > 0
        total = jnp.where(some, total, 1.0)
        level = jnp.where(some, level / LOG2E + jnp.log(total), 0.0)
    else:
        level = total = total + numbers.constant
    _save(y_ref, (_FIRST,), mean / total[:, None], q.at, f.queries, i * f.rows)
    _save(level_ref, (_FIRST,), level, q.at, f.queries, i * f.rows)


def of_queries(f: Form, refs: dict[str, Any], dq_ref: Any, sums_ref: Any = None) -> None:
    """Write dq of a block of queries, and its sums for the gradients of b, α and ε."""
    i, numbers, offset = pl.program_id(0), _numbers(refs, _FIRST), _offset(f, refs)
    q = _queries(f, refs, _FIRST, i, f.queries % f.rows != 0)

    def add(j: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
        k = _keys(f, refs, j, edge)
        scores = _compare(f, numbers, offset, q, k, _down, _across, edge)
        _, e = _pull(f, numbers, scores, _product(q.v, k.v, 1, 1), q, _down)
        of_dot, et = _of_dot(f, numbers, scores, e)
        dq = carry[0] + _product(of_dot.astype(k.x.dtype), k.x, 1, 0)
        if not f.yat:
            return (dq,)
        sums = [et, e * scores.ratio, et * scores.t] + [et * scores.free] * f.squares
        return dq, *(a + jnp.sum(b, 1) for a, b in zip(carry[1:], sums, strict=True))

    zeros = jnp.zeros((f.rows,), jnp.float32)
    start = (jnp.zeros(q.x.shape, jnp.float32), *[zeros] * (f.yat * (3 + f.squares)))
    dq, *sums = _loop(_span_of_queries(f, i, offset), add, start)
    if f.squares:
        dq -= (2.0 * numbers.alpha * sums[3])[:, None] * q.x.astype(jnp.float32)
    _save(dq_ref, (_FIRST,), dq, q.at, f.queries, i * f.rows)
    for n, factor in enumerate((2.0 * numbers.alpha, 1.0, -numbers.alpha) if f.yat else ()):
        sums_ref[n] = factor * jnp.sum(sums[n])


def of_keys(f: Form, refs: dict[str, Any], dk_ref: Any, dv_ref: Any) -> None:
    """Write dk and dv of a block of keys, summed over the query heads that share it."""
    j, offset = pl.program_id(0), _offset(f, refs)
    k = _keys(f, refs, j, f.keys % f.columns != 0)
    span = _span_of_keys(f, j, offset)

    def of_head(head: Array | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        numbers = _numbers(refs, head)

        def add(i: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
            q = _queries(f, refs, head, i, edge)
            scores = _compare(f, numbers, offset, q, k, _across, _down, edge)
            w, e = _pull(f, numbers, scores, _product(k.v, q.v, 1, 1), q, _across)
            dv = carry[1] + _product(w.astype(q.v.dtype), q.v, 1, 0)
            of_dot, et = _of_dot(f, numbers, scores, e)
            dk = carry[0] + _product(of_dot.astype(q.x.dtype), q.x, 1, 0)
            return dk, dv, *(a + numbers.alpha * jnp.sum(et * scores.free, 1) for a in carry[2:])

        return _loop(span, add, carry)

    heads = refs["q"].shape[0]
    start = (jnp.zeros(k.x.shape, jnp.float32), jnp.zeros(k.v.shape, jnp.float32))
    carry = (*start, *[jnp.zeros((f.columns,), jnp.float32)] * f.squares)
    dk, dv, *square = of_head(_FIRST, carry) if heads == 1 else jax.lax.fori_loop(0, heads, of_head, carry)
    if f.squares:
        dk -= (2.0 * square[0])[:, None] * k.x.astype(jnp.float32)
    _save(dk_ref, (), dk, k.at, f.keys, j * f.columns)
    _save(dv_ref, (), dv, k.at, f.keys, j * f.columns)


def _down(x: Array) -> Array:
    return x[:, None]


def _across(x: Array) -> Array:
    return x[None, :]


def _compare(
    f: Form,
    numbers: Numbers,
    offset: Array | int,
    q: Block,
    k: Block,
    of_q: Callable[[Array], Array],
    of_k: Callable[[Array], Array],
    edge: bool,
) -> Scores:
    """Return what the scores of two blocks are made of, of which the one that lies along `_down` comes first in the product."""
    first, second = (q, k) if of_q is _down else (k, q)
    dot = _product(first.x, second.x, 1, 1)
    if not f.yat:
        ratio = t = free = dot
    else:
        if q.square is None or k.square is None:
            far, near = 2.0 + numbers.epsilon, 2.0 * f.floor + numbers.epsilon
        else:
            far = of_q(q.square + numbers.epsilon) + of_k(k.square)
            near = _fma(f, f.floor, far, (1.0 - f.floor) * numbers.epsilon)
        distance = _fma(f, -2.0, dot, far)  # ε included
        n = dot + numbers.bias
        t = n * _inverse(f, jnp.maximum(distance, near))
        ratio, free = n * t, jnp.where(distance > near, t, 0.0)
    seen = _seen(f, offset, q, k, of_q, of_k, edge)
    return Scores(ratio, t, free, seen)


def _of_dot(f: Form, numbers: Numbers, scores: Scores, e: Array) -> tuple[Array, Array]:
    """Return dL/d(q·k) and e t, for e = dL/ds."""
    if not f.yat:
        return e * numbers.alpha, e
    et, twice = e * scores.t, 2.0 * numbers.alpha
    return et * _fma(f, twice, scores.free, twice), et


def _pull(
    f: Form, numbers: Numbers, scores: Scores, dw: Array, q: Block, of_q: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Return the weights, and dL/ds for dw = dL/dweight; `q.level` is −log₂ Σ 2ˢ, or 1/Σs."""
    dw = dw - of_q(q.centre)
    if f.softmax:
        w = _exp2(f, _hide(f, _fma(f, numbers.alpha * LOG2E, scores.ratio, of_q(q.level)), scores.seen))
        return w, w * dw
    s = _hide(f, numbers.alpha * scores.ratio, scores.seen)
    return s * of_q(q.level), jnp.where(s > 0, dw * of_q(q.level), 0.0)


def _hide(f: Form, s: Array, seen: Array | None) -> Array:
    if f.softmax:
        return s if seen is None else jnp.where(seen, s, -jnp.inf)
    return jnp.maximum(s if seen is None else jnp.where(seen, s, 0.0), 0.0)


def _seen(
    f: Form,
    offset: Array | int,
    q: Block,
    k: Block,
    of_q: Callable[[Array], Array],
    of_k: Callable[[Array], Array],
    edge: bool,
) -> Array | None:
    parts = []
    if edge and (f.causal or f.window is not None):
        ahead = of_k(k.at) - of_q(q.at + offset)
        parts += [ahead <= 0] if f.window is None else [ahead <= 0, ahead > -f.window]
    if edge and f.keys % f.columns:
        parts.append(of_k(k.at < f.keys))
    if q.segment is not None:
        parts.append(of_q(q.segment) == of_k(k.segment))
    if k.valid is not None:
        parts.append(of_k(k.valid != 0))
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen


def _loop(span: tuple[Array | int, ...], add: Callable[..., Any], carry: Any) -> Any:
    """Run the blocks first … a − 1 and b … last − 1 of (first, a, b, last) as edges, those between as interior."""
    for start, stop, edge in zip(span, span[1:], (True, False, True), strict=False):
        if not (isinstance(start, int) and isinstance(stop, int) and start == stop):
            carry = jax.lax.fori_loop(start, stop, lambda i, c, edge=edge: add(i, c, edge), carry)
    return carry


def _span_of_queries(f: Form, i: Array, offset: Array | int) -> tuple[Array | int, ...]:
    """Return (first, a, b, last): the key blocks that these queries see, of which a … b − 1 are seen whole."""
    count, whole = pl.cdiv(f.keys, f.columns), f.keys // f.columns
    if not f.causal and f.window is None:
        return 0, 0, whole, count
    low = i * f.rows + offset
    high = low + f.rows - 1
    last = jnp.minimum(_floor(high, f.columns) + 1, count) * (high >= 0)
    b = jnp.minimum(_floor(low + 1, f.columns), whole)
    if f.window is None:
        return 0, 0, jnp.minimum(b, last), last
    first = jnp.minimum(_floor(low - f.window + 1, f.columns), last)
    a = jnp.clip(_floor(high - f.window + f.columns, f.columns), first, last)
    return first, a, jnp.clip(b, a, last), last


def _span_of_keys(f: Form, j: Array, offset: Array | int) -> tuple[Array | int, ...]:
    """Return (first, a, b, last): the query blocks that see these keys, of which a … b − 1 see all of them."""
    count, whole = pl.cdiv(f.queries, f.rows), f.queries // f.rows
    if not f.causal and f.window is None:
        return 0, 0, whole, count
    low = j * f.columns - offset
    first = jnp.minimum(_floor(low, f.rows), count)
    a = jnp.clip(_floor(low + f.columns + f.rows - 2, f.rows), first, count)
    if f.window is None:
        return first, a, jnp.maximum(a, whole), count
    end = low + f.columns + f.window - 1
    last = jnp.clip(_floor(end + f.rows - 1, f.rows), first, count)
    a, b = jnp.minimum(a, last), jnp.minimum(_floor(low + f.window, f.rows), whole)
    return first, a, jnp.clip(b, a, last), last


def _floor(x: Array, n: int) -> Array:
    """Return max(x, 0) // n."""
    return jax.lax.div(jnp.maximum(x, 0), jnp.int32(n))


def _product(x: Array, w: Array, of_x: int, of_w: int) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # TF32 would lose distances
    axes = (((of_x,), (of_w,)), ((), ()))
    return jax.lax.dot_general(x, w, axes, precision=precision, preferred_element_type=jnp.float32)


def _exp2(f: Form, x: Array) -> Array:
    return jnp.exp2(x) if f.interpret else _instruction("ex2.approx.ftz.f32", x)


def _inverse(f: Form, x: Array) -> Array:
    return 1.0 / x if f.interpret else _instruction("rcp.approx.ftz.f32", x)


def _fma(f: Form, x: Any, y: Any, z: Any) -> Array:
    """Return x y + z, which the compiler would not contract."""
    return x * y + z if f.interpret else _instruction("fma.rn.ftz.f32", x, y, z)


def _instruction(name: str, *args: Any) -> Array:
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in args))
    args = tuple(jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in args)
    places = ", ".join(f"${n}" for n in range(len(args) + 1))
    [y] = plt.elementwise_inline_asm(
        f"{name} {places};",
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return y


def _numbers(refs: dict[str, Any], head: Array | int) -> Numbers:
    return Numbers(*(refs["numbers"][head, n] for n in range(4)))


def _offset(f: Form, refs: dict[str, Any]) -> Array | int:
    return refs["offset"][0] if "offset" in refs else 0


def _queries(f: Form, refs: dict[str, Any], head: Array | int, i: Array, cut: bool) -> Block:
    """Load block i of the queries of a head; `cut` if it may reach beyond the last."""
    start = i * f.rows
    load = lambda name, other=0: _load(refs, name, (head,), start, f.rows, f.queries if cut else None, other)  # noqa: E731
    segment = _load(refs, "query_segments", (), start, f.rows, f.queries if cut else None, 0)
    return Block(
        start + jnp.arange(f.rows),
        load("q"),
        load("q_square"),
        segment,
        v=load("g"),
        level=load("level", -jnp.inf if f.softmax else 0),  # so that queries beyond the last give no weight
        centre=load("centre"),
    )


def _keys(f: Form, refs: dict[str, Any], j: Array, cut: bool) -> Block:
    start = j * f.columns
    load = lambda name: _load(refs, name, (), start, f.columns, f.keys if cut else None, 0)  # noqa: E731
    at = start + jnp.arange(f.columns)
    return Block(at, load("k"), load("k_square"), load("key_segments"), load("valid"), load("v"))


def _load(refs: dict[str, Any], name: str, at: tuple, start: Array, size: int, length: int | None, other: Any) -> Any:
    """Load `size` rows from `start` on, `other` from `length` on; None if there is no such array."""
    if name not in refs:
        return None
    ref = refs[name].at[(*at, pl.ds(start, size))]
    if length is None or length % size == 0:
        return plt.load(ref)
    inside = start + jnp.arange(size) < length
    return plt.load(ref, mask=inside[:, None] if len(ref.shape) == 2 else inside, other=other)


def _save(ref: Any, head: tuple, x: Array, at: Array, length: int, start: Array) -> None:
    size = x.shape[0]
    mask = None if length % size == 0 else at < length
    if mask is not None and x.ndim == 2:
        mask = mask[:, None]
    plt.store(ref.at[(*head, pl.ds(start, size))], x.astype(ref.dtype), mask=mask)
