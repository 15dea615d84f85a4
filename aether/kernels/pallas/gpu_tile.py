"""What the GPU kernels do with one block of queries and one of keys: load them, compare them, weigh, differentiate.

With n = q·k + b, Q = D + ε and t = n/Q the score is s = (α/√d) n t, ds/dn = 2 (α/√d) t and ds/dQ = −(α/√d) t². What is
done for each pair of query and key costs as much as the products. So exponentials are powers of 2, scores of softmax
having a factor log₂ e; and 2ˣ, 1/x and x y + z are written as instructions, because Triton's own 2ˣ and 1/x spend more
of them on numbers below 2⁻¹²⁶, and XLA lets it contract no product and sum.

Scores are (query, key) or (key, query): whoever is turned `down` when loaded comes first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from aether.kernels.pallas import tile
from aether.kernels.pallas.tile import hide, product

Refs = dict[str, Any]
Turn = Callable[[Array], Array]


@dataclass(frozen=True)
class Form(tile.Form):
    """What a kernel is compiled for; lengths and block sizes are numbers of queries and of keys."""

    causal: bool
    window: int | None
    queries: int
    keys: int
    rows: int
    columns: int
    interpret: bool


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


def compare(f: Form, numbers: Numbers, q: Queries, k: Keys, edge: bool) -> Pairs:
    """Return what the scores of two blocks are made of; whoever is loaded `down` comes first."""
    left, right = (q.x, k.x) if q.at.shape[1] == 1 else (k.x, q.x)
    dot, seen = product(left, right, 1, 1), _seen(f, q, k, edge)
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


def weigh(f: Form, numbers: Numbers, pairs: Pairs, dw: Array, q: Queries) -> tuple[Array, Array]:
    """Return the weights w, and dL/ds for dw = dL/dw."""
    dw = dw - q.centre
    if f.softmax:
        w = exp2(f, hide(f, _fma(f, numbers.alpha * f.unit, pairs.ratio, q.level), pairs.seen))
        return w, w * dw
    s = hide(f, numbers.alpha * pairs.ratio, pairs.seen)
    return s * q.level, jnp.where(s > 0, dw * q.level, 0.0)


def of_dot(f: Form, numbers: Numbers, pairs: Pairs, e: Array) -> tuple[Array, Array]:
    """Return dL/d(q·k) and e t, for e = dL/ds."""
    if not f.yat:
        return e * numbers.alpha, e
    et, twice = e * pairs.t, 2.0 * numbers.alpha
    return et * _fma(f, twice, pairs.free, twice), et


def exp2(f: Form, x: Array) -> Array:
    """Return 2ˣ."""
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


def down(x: Array) -> Array:
    """Lay what belongs to the first axis of the scores along it."""
    return x[:, None]


def across(x: Array) -> Array:
    """Lay what belongs to the second axis of the scores along it."""
    return x[None, :]


def numbers_of(refs: Refs, head: Any) -> Numbers:
    """Load the numbers of a head, of those that the program sees."""
    return Numbers(*(refs["numbers"][head, n] for n in range(4)))


def offset_of(refs: Refs) -> Array | int:
    """Return how many keys precede the first query."""
    return refs["offset"][0] if "offset" in refs else 0


def load_queries(f: Form, refs: Refs, head: Any, i: Array, cut: bool, turn: Turn) -> Queries:
    """Load block i of a head's queries; `cut` if it may end early."""

    def load(name: str, *at: Any, other: float = 0) -> Any:
        return _load(refs, name, at, i * f.rows, f.rows, f.queries if cut else None, other)

    def of_each(name: str, *at: Any, other: float = 0) -> Any:
        return None if name not in refs else turn(load(name, *at, other=other))

    return Queries(
        turn(i * f.rows + offset_of(refs) + jnp.arange(f.rows)),
        load("q", head),
        of_each("q_square", head),
        of_each("query_segments"),
        load("g", head) if "g" in refs else None,
        of_each("level", head, other=-jnp.inf if f.softmax else 0),  # queries beyond the last give no weight
        of_each("centre", head),
    )


def load_keys(f: Form, refs: Refs, j: Array, cut: bool, turn: Turn) -> Keys:
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


def save(ref: Any, at: tuple, start: Array, x: Array, length: int) -> None:
    """Store the rows of x from `start` on, without those from `length` on."""
    size = x.shape[0]
    mask = _inside(start, size, length, x.ndim) if length % size else None
    plt.store(ref.at[(*at, pl.ds(start, size))], x.astype(ref.dtype), mask=mask)


def _inside(start: Array, size: int, length: int, axes: int) -> Array:
    return (start + jnp.arange(size) < length).reshape(size, *[1] * (axes - 1))
