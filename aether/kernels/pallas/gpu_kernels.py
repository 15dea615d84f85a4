"""What one program of flash ⵟ-attention does on an NVIDIA GPU: the forward pass, and the gradients of q and of k and v.

With n = q·k + b, Q = D + ε and t = n/Q the score is s = (α/√d) n t, ds/dn = 2 (α/√d) t and ds/dQ = −(α/√d) t². What is
done for each pair of query and key costs as much as the products. So exponentials are powers of 2, scores of softmax
having a factor log₂ e; and 2ˣ, 1/x and x y + z are written as instructions, because Triton's own 2ˣ and 1/x spend more
of them on numbers below 2⁻¹²⁶, and XLA lets it contract no product and sum.

Scores are (query, key) in the first two kernels and (key, query) in the last, so that the product with weights has them
on its left, where tensor cores read registers. Blocks that are seen whole have a loop of their own, without booleans.
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

Refs = dict[str, Any]
Span = tuple[Array | int, Array | int, Array | int, Array | int]
Turn = Callable[[Array], Array]


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

    @property
    def unit(self) -> float:
        """Return the factor of the scores."""
        return LOG2E if self.softmax else 1.0


class Numbers(NamedTuple):
    """b, α/√d (1/√d of dot products), ε and ε₁ of one head."""

    bias: Array
    alpha: Array
    epsilon: Array
    constant: Array


class Queries(NamedTuple):
    """A block of queries; all but q and g lie along the side of the scores that is theirs, None if not needed."""

    at: Any  # their positions among the keys
    x: Any
    square: Any
    segment: Any
    g: Any = None
    level: Any = None  # −log₂ Σ 2ˢ, or 1/(Σ s + ε₁)
    centre: Any = None


class Keys(NamedTuple):
    """A block of keys; all but k and v lie along the side of the scores that is theirs, None if not needed."""

    at: Any
    x: Any
    v: Any
    square: Any
    segment: Any
    valid: Any


class Pairs(NamedTuple):
    """n²/Q (or q·k), t = n/Q, t where the distance is free and 0 elsewhere, and which pairs are seen."""

    ratio: Array
    t: Array
    free: Array
    seen: Array | None


def forward(f: Form, refs: Refs, y_ref: Any, level_ref: Any) -> None:
    """Write y and the final level of a block of queries."""
    i, numbers = pl.program_id(0), _numbers(refs, _FIRST)
    q = _queries(f, refs, _FIRST, i, True, _down)

    def add(j: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
        level, total, mean = carry
        k = _keys(f, refs, j, edge, _across)
        pairs = _compare(f, numbers, q, k, edge)
        w = _hide(f, (numbers.alpha * f.unit) * pairs.ratio, pairs.seen)
        if f.softmax:
            higher = jnp.maximum(level, jnp.max(w, 1))
            w, shrink = _exp2(f, w - higher[:, None]), _exp2(f, level - higher)
            level, total, mean = higher, total * shrink, mean * shrink[:, None]
        return level, total + jnp.sum(w, 1), mean + _product(w.astype(k.v.dtype), k.v, 1, 0)

    zeros = jnp.zeros((f.rows,), jnp.float32)
    start = (zeros + _LOW, zeros, jnp.zeros(q.x.shape, jnp.float32))
    level, total, mean = _loop(span_of_queries(f, i, _offset(refs)), add, start)
    if f.softmax:
        some = total > 0
        total = jnp.where(some, total, 1.0)
        level = jnp.where(some, level / LOG2E + jnp.log(total), 0.0)
    else:
        level = total = total + numbers.constant
    _save(y_ref, (_FIRST,), i * f.rows, mean / total[:, None], f.queries)
    _save(level_ref, (_FIRST,), i * f.rows, level, f.queries)


def of_queries(f: Form, refs: Refs, dq_ref: Any, sums_ref: Any = None) -> None:
    """Write dq of a block of queries, and what it adds to the gradients of b, α/√d and ε."""
    i, numbers = pl.program_id(0), _numbers(refs, _FIRST)
    q = _queries(f, refs, _FIRST, i, True, _down)

    def add(j: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
        k = _keys(f, refs, j, edge, _across)
        pairs = _compare(f, numbers, q, k, edge)
        _, e = _weigh(f, numbers, pairs, _product(q.g, k.v, 1, 1), q)
        of_dot, et = _of_dot(f, numbers, pairs, e)
        dq = carry[0] + _product(of_dot.astype(k.x.dtype), k.x, 1, 0)
        if not f.yat:
            return (dq,)
        terms = [et, e * pairs.ratio, et * pairs.t] + [et * pairs.free] * f.squares
        return dq, *(total + jnp.sum(term, 1) for total, term in zip(carry[1:], terms, strict=True))

    zeros = jnp.zeros((f.rows,), jnp.float32)
    start = (jnp.zeros(q.x.shape, jnp.float32), *[zeros] * (f.yat * (3 + f.squares)))
    dq, *sums = _loop(span_of_queries(f, i, _offset(refs)), add, start)
    if f.squares:
        dq -= (2.0 * numbers.alpha * sums[3])[:, None] * q.x.astype(jnp.float32)
    _save(dq_ref, (_FIRST,), i * f.rows, dq, f.queries)
    for n, factor in enumerate((2.0 * numbers.alpha, 1.0, -numbers.alpha) if f.yat else ()):
        sums_ref[n] = factor * jnp.sum(sums[n])


def of_keys(f: Form, refs: Refs, dk_ref: Any, dv_ref: Any) -> None:
    """Write dk and dv of a block of keys, summed over the query heads that share it."""
    j = pl.program_id(0)
    k = _keys(f, refs, j, True, _down)

    def of_head(head: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        numbers = _numbers(refs, head)

        def add(i: Array, carry: tuple[Array, ...], edge: bool) -> tuple[Array, ...]:
            q = _queries(f, refs, head, i, edge, _across)
            pairs = _compare(f, numbers, q, k, edge)
            w, e = _weigh(f, numbers, pairs, _product(k.v, q.g, 1, 1), q)
            of_dot, et = _of_dot(f, numbers, pairs, e)
            dk = carry[0] + _product(of_dot.astype(q.x.dtype), q.x, 1, 0)
            dv = carry[1] + _product(w.astype(q.g.dtype), q.g, 1, 0)
            return dk, dv, *(total + numbers.alpha * jnp.sum(et * pairs.free, 1) for total in carry[2:])

        return _loop(span_of_keys(f, j, _offset(refs)), add, carry)

    zeros = jnp.zeros(k.x.shape, jnp.float32)
    carry: tuple[Array, ...] = (zeros, zeros, *[jnp.zeros((f.columns,), jnp.float32)] * f.squares)
    heads = refs["q"].shape[0]
    dk, dv, *square = of_head(_FIRST, carry) if heads == 1 else jax.lax.fori_loop(0, heads, of_head, carry)
    if f.squares:
        dk -= (2.0 * square[0])[:, None] * k.x.astype(jnp.float32)
    _save(dk_ref, (), j * f.columns, dk, f.keys)
    _save(dv_ref, (), j * f.columns, dv, f.keys)


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


def _compare(f: Form, numbers: Numbers, q: Queries, k: Keys, edge: bool) -> Pairs:
    """Return what the scores of two blocks are made of; whoever is loaded `_down` comes first."""
    left, right = (q.x, k.x) if q.at.shape[1] == 1 else (k.x, q.x)
    dot, seen = _product(left, right, 1, 1), _seen(f, q, k, edge)
    if not f.yat:
        return Pairs(dot, dot, dot, seen)
    far, near = 2.0 + numbers.epsilon, 2.0 * f.floor + numbers.epsilon
    if f.squares:
        far = (q.square + numbers.epsilon) + k.square
        near = _fma(f, f.floor, far, (1.0 - f.floor) * numbers.epsilon)
    distance = _fma(f, -2.0, dot, far)  # ε included
    n = dot + numbers.bias
    t = n * _inverse(f, jnp.maximum(distance, near))
    return Pairs(n * t, t, jnp.where(distance > near, t, 0.0), seen)


def _seen(f: Form, q: Queries, k: Keys, edge: bool) -> Array | None:
    parts = []
    if edge and (f.causal or f.window is not None):
        parts.append(k.at <= q.at)
    if edge and f.window is not None:
        parts.append(k.at > q.at - f.window)
    if edge and f.keys % f.columns:
        parts.append(k.at < f.keys)
    if q.segment is not None:
        parts.append(q.segment == k.segment)
    if k.valid is not None:
        parts.append(k.valid != 0)
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen


def _hide(f: Form, s: Array, seen: Array | None) -> Array:
    if f.softmax:
        return s if seen is None else jnp.where(seen, s, -jnp.inf)
    return jnp.maximum(s if seen is None else jnp.where(seen, s, 0.0), 0.0)


def _weigh(f: Form, numbers: Numbers, pairs: Pairs, dw: Array, q: Queries) -> tuple[Array, Array]:
    """Return the weights w, and dL/ds for dw = dL/dw."""
    dw = dw - q.centre
    if f.softmax:
        w = _exp2(f, _hide(f, _fma(f, numbers.alpha * f.unit, pairs.ratio, q.level), pairs.seen))
        return w, w * dw
    s = _hide(f, numbers.alpha * pairs.ratio, pairs.seen)
    return s * q.level, jnp.where(s > 0, dw * q.level, 0.0)


def _of_dot(f: Form, numbers: Numbers, pairs: Pairs, e: Array) -> tuple[Array, Array]:
    """Return dL/d(q·k) and e t, for e = dL/ds."""
    if not f.yat:
        return e * numbers.alpha, e
    et, twice = e * pairs.t, 2.0 * numbers.alpha
    return et * _fma(f, twice, pairs.free, twice), et


def _product(x: Array, w: Array, of_x: int, of_w: int) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # TF32 would lose distances
    axes = (((of_x,), (of_w,)), ((), ()))
    return jax.lax.dot_general(x, w, axes, precision=precision, preferred_element_type=jnp.float32)


def _exp2(f: Form, x: Array) -> Array:
    return jnp.exp2(x) if f.interpret else _instruction("ex2.approx.ftz.f32", x)


def _inverse(f: Form, x: Array) -> Array:
    return 1.0 / x if f.interpret else _instruction("rcp.approx.ftz.f32", x)


def _fma(f: Form, x: Any, y: Any, z: Any) -> Array:
    return x * y + z if f.interpret else _instruction("fma.rn.ftz.f32", x, y, z)


def _instruction(name: str, *args: Any) -> Array:
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in args))
    places = ", ".join(f"${n}" for n in range(len(args) + 1))
    [y] = plt.elementwise_inline_asm(
        f"{name} {places};",
        args=[jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in args],
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return y


def _down(x: Array) -> Array:
    return x[:, None]


def _across(x: Array) -> Array:
    return x[None, :]


def _numbers(refs: Refs, head: Any) -> Numbers:
    return Numbers(*(refs["numbers"][head, n] for n in range(4)))


def _offset(refs: Refs) -> Array | int:
    return refs["offset"][0] if "offset" in refs else 0


def _queries(f: Form, refs: Refs, head: Any, i: Array, cut: bool, turn: Turn) -> Queries:
    """Load block i of a head's queries; `cut` if it may end early."""

    def load(name: str, *at: Any, other: float = 0) -> Any:
        return _load(refs, name, at, i * f.rows, f.rows, f.queries if cut else None, other)

    def of_each(name: str, *at: Any, other: float = 0) -> Any:
        return None if name not in refs else turn(load(name, *at, other=other))

    return Queries(
        turn(i * f.rows + _offset(refs) + jnp.arange(f.rows)),
        load("q", head),
        of_each("q_square", head),
        of_each("query_segments"),
        load("g", head) if "g" in refs else None,
        of_each("level", head, other=-jnp.inf if f.softmax else 0),  # queries beyond the last give no weight
        of_each("centre", head),
    )


def _keys(f: Form, refs: Refs, j: Array, cut: bool, turn: Turn) -> Keys:
    """Load block j of the keys; `cut` if it may end early."""

    def load(name: str) -> Any:
        return _load(refs, name, (), j * f.columns, f.columns, f.keys if cut else None, 0)

    each = [turn(load(name)) if name in refs else None for name in ("k_square", "key_segments", "valid")]
    return Keys(turn(j * f.columns + jnp.arange(f.columns)), load("k"), load("v"), *each)


def _load(refs: Refs, name: str, at: tuple, start: Array, size: int, length: int | None, other: float) -> Array:
    """Load `size` rows from `start` on, `other` in place of those from `length` on."""
    ref = refs[name].at[(*at, pl.ds(start, size))]
    if length is None or length % size == 0:
        return plt.load(ref)
    return plt.load(ref, mask=_inside(start, size, length, len(ref.shape)), other=other)


def _save(ref: Any, at: tuple, start: Array, x: Array, length: int) -> None:
    size = x.shape[0]
    mask = _inside(start, size, length, x.ndim) if length % size else None
    plt.store(ref.at[(*at, pl.ds(start, size))], x.astype(ref.dtype), mask=mask)


def _inside(start: Array, size: int, length: int, axes: int) -> Array:
    return (start + jnp.arange(size) < length).reshape(size, *[1] * (axes - 1))
