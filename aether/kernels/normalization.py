"""How the scores of a row become weights, whole or block by block: softmax, L1 and softermax.

Each weight is a function of the score and of one number a row, its level: softmax exp(s − level) with level = log Σ eˢ,
softermax (s/level)ⁿ with levelⁿ = ε₁ + Σ sⁿ; L1 is softermax with n = 1. A running level does for the online form what
the running maximum is known to do for softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), and keeps large powers
finite. ε₁ acts as a key of its own with score ε₁^(1/n) and value 0.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

NORMALIZATIONS = ("softmax", "l1", "softermax")
_LOW = -1e30  # stands for the maximum of no score


@partial(jax.tree_util.register_dataclass, data_fields=["constant"], meta_fields=["name", "power"])
@dataclass(frozen=True)
class Normalization:
    """softmax eˢ/Σeˢ, L1 s/(Σs + ε₁), or softermax sⁿ/(Σsⁿ + ε₁); the last two take a negative score for 0."""

    name: str = "softmax"
    power: float = 1.0
    """n > 0 of softermax."""
    constant: Array | float = 1e-12
    """ε₁ > 0 of L1 and softermax; a number, or (h,)."""

    def checked(self) -> Self:
        """Return it.

        Raises:
          ValueError: an unknown name, or a number out of its range.
        """
        if self.name not in NORMALIZATIONS:
            raise ValueError(f"normalization is {self.name!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
        if not 0 < self.power < float("inf") or (self.name != "softermax" and self.power != 1.0):
            raise ValueError(f"power is {self.power} with {self.name}; softermax takes one above 0, the others 1.")
        if isinstance(self.constant, float | int) and not 0 < self.constant < float("inf"):
            raise ValueError(f"constant is {self.constant}; it must be a positive finite number.")
        return self

    def by_head(self, *heads: int) -> Self:
        """Return it for scores (b, *heads, t, s), where `heads` is (h,) or (g, r) with h = g r.

        Raises:
          ValueError: the constant is neither one nor `h` numbers.
        """
        constant = jnp.asarray(self.constant, jnp.float32)
        h = math.prod(heads)
        if constant.shape not in ((), (1,), (h,)):
            raise ValueError(f"constant is {constant.shape}; it must be a number or ({h},), one a head.")
        return replace(self, constant=constant.reshape(*heads, 1, 1) if constant.size > 1 else constant)

    def weights(self, scores: Array, seen: Array | None) -> Array:
        """Return the weights of whole rows (..., s); `seen` broadcasts to them, None is everything."""
        if self.name == "softmax":
            if seen is None:
                return jax.nn.softmax(scores, axis=-1)
            return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, _LOW), axis=-1), 0.0)
        scores = self.hide(scores, seen)
        level, total = self.start(scores[..., :1])
        top = jax.lax.stop_gradient(jnp.maximum(level, jnp.max(scores, -1, keepdims=True)))
        weights = self.weight(scores, top)
        return weights / (jnp.sum(weights, -1, keepdims=True) + total * self.weight(level, top))

    def start(self, like: Array) -> tuple[Array, Array]:
        """Return the level and the sum of a row before its first score."""
        if self.name == "softmax":
            return jnp.full_like(like, _LOW), jnp.zeros_like(like)
        constant = self.constant if self.power == 1.0 else self.constant ** (1.0 / self.power)
        return jnp.broadcast_to(constant, like.shape), jnp.ones_like(like)

    def hide(self, scores: Array, seen: Array | None) -> Array:
        """Replace scores that are not seen by one whose weight is 0."""
        if self.name == "softmax":
            return scores if seen is None else jnp.where(seen, scores, -jnp.inf)
        return jnp.maximum(scores if seen is None else jnp.where(seen, scores, 0.0), 0.0)

    def weight(self, score: Array, level: Array) -> Array:
        """Return the weight of a score at that level; also what a sum is multiplied by when its level rises."""
        if self.name == "softmax":
            return jnp.exp(score - level)
        if self.power == 1.0:
            return score / level
        safe = jnp.where(score > 0, score, level)
        return jnp.where(score > 0, (safe / level) ** self.power, 0.0)

    def final_level(self, level: Array, total: Array) -> Array:
        """Return the level at which the weights that sum to `total` at `level` sum to 1; finite for empty rows."""
        if self.name == "softmax":
            return jnp.where(total > 0, level + jnp.log(jnp.where(total > 0, total, 1.0)), 0.0)
        return level * total ** (1.0 / self.power)

    def slope(self, score: Array, level: Array, weight: Array) -> Array:
        """Return d weight / d score at a fixed level."""
        if self.name == "softmax":
            return weight
        safe = jnp.where(score > 0, score, 1.0)
        return jnp.where(score > 0, (1.0 / level if self.power == 1.0 else self.power * weight / safe), 0.0)

    def constant_gradient(self, level: Array, centre: Array) -> Self:
        """Return dL/dε₁ in ε₁'s place: −Σ centre / levelⁿ, with centre = Σ dL/do · o of each row (b, g, r, t, 1)."""
        if self.name == "softmax":
            return replace(self, constant=jnp.zeros_like(self.constant))
        gradient = -centre / (level if self.power == 1.0 else level**self.power)
        shape = jnp.shape(self.constant)
        axes = (0, 3, 4) if len(shape) > 1 else None
        return replace(self, constant=jnp.sum(gradient, axes).reshape(shape))
