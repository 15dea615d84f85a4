"""The arithmetic of one tile of flash attention, on plain arrays: scores, and the gradient of what is upstream of them.

Everything is elementwise, so that a kernel may hold the scores of a tile as (query, key) or as (key, query); statistics
of queries and keys broadcast to them. With n = q·k + b, Q = max(S − 2 q·k, floor·S) + ε and t = n/Q the score is α n t /
√d, and ds/dn = 2 α t / √d, ds/dQ = −α t² / √d.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from aether.kernels.scores import Score, YatScore
from aether.kernels.yat import floor_of

LOW = -1e30  # stands for the maximum of no score


class Form(NamedTuple):
    """What is known of scores and weights when a kernel is built."""

    yat: bool
    spherical: bool
    floor: float
    softmax: bool

    @property
    def squares(self) -> bool:
        """Say whether the scores need ‖q‖² and ‖k‖²."""
        return self.yat and not self.spherical


class Parameters(NamedTuple):
    """Numbers of one head: b, α/√d and ε; a dot product has only its factor."""

    bias: Any
    factor: Any
    epsilon: Any


class Compared(NamedTuple):
    """Scores and what their gradient needs."""

    score: Array
    n: Array | None = None
    t: Array | None = None
    free: Array | None = None


class Slopes(NamedTuple):
    """dL by q·k, by ‖q‖² and ‖k‖² alike, by b, by α/√d and by ε, an entry a pair."""

    dot: Array
    square: Array | None = None
    bias: Array | None = None
    factor: Array | None = None
    epsilon: Array | None = None


def form_of(score: Score, softmax: bool, dtype: Any) -> Form:
    """Return the form of a score of operands of this dtype."""
    if not isinstance(score, YatScore):
        return Form(False, False, 0.0, softmax)
    return Form(True, score.spherical, floor_of(dtype, score.spherical), softmax)


def compare(form: Form, dot: Array, square: Array | float, p: Parameters) -> Compared:
    """Return the scores of pairs with these q·k and ‖q‖² + ‖k‖²."""
    if not form.yat:
        return Compared(dot * p.factor)
    n, least, distance = dot + p.bias, form.floor * square, square - 2.0 * dot
    t = n / (jnp.maximum(distance, least) + p.epsilon)
    return Compared(p.factor * (n * t), n, t, distance > least)


def pull(form: Form, g: Array, c: Compared, p: Parameters) -> Slopes:
    """Return the gradients of what made the scores, for a gradient `g` of the scores."""
    if c.n is None or c.t is None:
        return Slopes(g * p.factor)
    of_half_n = g * p.factor * c.t
    of_n, of_q = 2.0 * of_half_n, -of_half_n * c.t
    of_square = jnp.where(c.free, of_q, 0.0)
    return Slopes(of_n - 2.0 * of_square, of_square, of_n, g * c.n * c.t, of_q)


def hide(form: Form, score: Array, seen: Array | None) -> Array:
    """Replace scores that are not seen by one whose weight is 0; L1 takes negative ones for 0."""
    if form.softmax:
        return score if seen is None else jnp.where(seen, score, -jnp.inf)
    return jnp.maximum(score if seen is None else jnp.where(seen, score, 0.0), 0.0)


def weigh(form: Form, score: Array, level: Array) -> tuple[Array, Array]:
    """Return the weights at the final level, and d weight / d score there."""
    if form.softmax:
        w = jnp.exp(score - level)
        return w, w
    inverse = 1.0 / level
    return score * inverse, jnp.where(score > 0, inverse, 0.0)
