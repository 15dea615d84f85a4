"""The arithmetic of one tile of flash attention, on plain arrays, in as few vector operations as it takes.

Vector units, not matrix units, bound ⵟ-attention, so factors are moved to where a number is one a head or one a vector.
Queries come doubled (exact in any floating dtype), so that a tile begins with m = 2 q·k:

    N = m + 2b = 2n    Q = max(S + ε − m, floor·S + ε)    T = N/Q = 2t    u = N T = 4 n²/Q    score = u · α / (4 √d)

and for a gradient g of the score: z = g T, w = z T, g ds/dn = z α/√d, g ds/dQ = −w α/(4 √d), and by q·k in all z + w/2,
in α/√d, where the distance is not clamped. Weights of softmax are powers of two, of scores and levels times log₂ e.

All but `product` is elementwise: tiles may be (query, key) or (key, query), what belongs to one side broadcasts.
GPUs take the form, `hide`, `product` and `of_numbers` from here; the rest is in their own instructions in `gpu_tile`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.scores import Score, YatScore
from aether.kernels.tail import floor_of

LOW = -1e30  # stands for the maximum of no score
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Form:
    """What is known of scores and weights when a kernel is built."""

    yat: bool
    spherical: bool
    floor: float
    softmax: bool

    @property
    def squares(self) -> bool:
        """Say whether the scores need ‖q‖² and ‖k‖²."""
        return self.yat and not self.spherical

    @property
    def unit(self) -> float:
        """Return what scores and levels are multiplied by within a kernel."""
        return LOG2E if self.softmax else 1.0


class Head(NamedTuple):
    """Numbers of one head: 2b and ε."""

    bias: Any
    epsilon: Any


class Pairs(NamedTuple):
    """u (m for a dot product), T, and where the distance is not clamped."""

    u: Array
    t: Array | None = None
    free: Array | None = None


class Slopes(NamedTuple):
    """Gradients in units of α/√d: by q·k; by b, by ‖q‖² and ‖k‖² (times −4), by α (times 4 α), by ε (times −4)."""

    dot: Array
    bias: Array | None = None
    square: Array | None = None
    alpha: Array | None = None
    epsilon: Array | None = None


def form_of(score: Score, softmax: bool, dtype: Any) -> Form:
    """Return the form of a score of operands of this dtype."""
    if not isinstance(score, YatScore):
        return Form(False, False, 0.0, softmax)
    return Form(True, score.spherical, floor_of(dtype, score.spherical), softmax)


def product(x: Array, w: Array, of_x: int, of_w: int) -> Array:
    """Return the product of two matrices over these axes, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # less would lose distances
    axes = (((of_x,), (of_w,)), ((), ()))
    return jax.lax.dot_general(x, w, axes, precision=precision, preferred_element_type=jnp.float32)


def compare(form: Form, m: Array, squares: tuple[Any, Any], head: Head, inverse: Callable[[Array], Array]) -> Pairs:
    """Return what the scores are made of, for m = 2 q·k and the squared norms of both sides.

    Args:
      form: of the score.
      m: 2 q·k of the pairs.
      squares: ‖q‖² and ‖k‖², broadcastable to `m`; 1 and 1 of unit vectors.
      head: see there.
      inverse: 1/x for normal numbers.
    """
    if not form.yat:
        return Pairs(m)
    one, other = squares
    free = (one + head.epsilon) + other - m
    least = (form.floor * one + head.epsilon) + form.floor * other
    n = m + head.bias
    t = n * inverse(jnp.maximum(free, least))
    return Pairs(n * t, t, free > least)


def pull(form: Form, g: Array, pairs: Pairs) -> Slopes:
    """Return the gradients of what made the scores, for a gradient `g` of the scores."""
    if pairs.t is None or pairs.free is None:
        return Slopes(g)
    z = g * pairs.t
    w = z * pairs.t
    square = jnp.where(pairs.free, w, 0.0)
    return Slopes(z + 0.5 * square, z, square, g * pairs.u, w)


def hide(form: Form, score: Array, seen: Array | None) -> Array:
    """Replace scores that are not seen by one whose weight is 0; L1 takes negative ones for 0."""
    if form.softmax:
        return score if seen is None else jnp.where(seen, score, -jnp.inf)
    return jnp.maximum(score if seen is None else jnp.where(seen, score, 0.0), 0.0)


def weigh(form: Form, score: Array, level: Array, inverse: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Return the weights at the final level (times `unit`), and d weight / d score there."""
    if form.softmax:
        w = jnp.exp2(score - level)
        return w, w
    scale = inverse(level)
    return score * scale, jnp.where(score > 0, scale, 0.0)


def of_numbers(score: YatScore, bias: Array, alpha: Array, epsilon: Array) -> YatScore:
    """Return the gradients of b, α and ε in their shapes, for one of each a head, (h,)."""

    def like(number: Array | float, each: Array) -> Array:
        return (each if jnp.size(number) > 1 else jnp.sum(each)).reshape(jnp.shape(number))

    return replace(
        score,
        bias=like(score.bias, bias),
        alpha=like(score.alpha, alpha),
        epsilon=like(score.epsilon, epsilon),
    )
