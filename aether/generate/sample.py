"""Drawing the next token from logits.

Axes: b rows, v vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array

_COLDEST = 1e-30  # division by a smaller temperature would overflow; at this one the draw is an argmax already


def sample(
    logits: Array, keys: Array, *, temperature: Array | float, top_k: Array | int, top_p: Array | float
) -> Array:
    """Draw one id a row from softmax(logits / temperature), restricted to the likeliest.

    Args:
      logits: (b, v) float32; ids at -inf are never drawn.
      keys: (b,) random keys, so that a row's draw does not depend on the other rows.
      temperature: 0 takes the likeliest id.
      top_k: draw among the k likeliest ids; 0: all.
      top_p: then among the fewest likeliest that hold this share of what is left (Holtzman et al., 2019); 1: all.

    Returns:
      (b,) int32. Of equal logits the lower id counts as likelier. The three numbers may be traced.
    """

    def draw(logits: Array) -> Array:
        scaled = (logits - jnp.max(logits, -1, keepdims=True)) / jnp.maximum(temperature, _COLDEST)
        cut = jnp.logical_or(jnp.asarray(top_k) > 0, jnp.asarray(top_p) < 1)
        scaled = jax.lax.cond(cut, lambda x: restrict(x, top_k, top_p), lambda x: x, scaled)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    def likeliest(logits: Array) -> Array:
        return jnp.argmax(logits, -1).astype(jnp.int32)

    return jax.lax.cond(jnp.asarray(temperature) > 0, draw, likeliest, logits)


def restrict(logits: Array, top_k: Array | int, top_p: Array | float) -> Array:
    """Return the logits (b, v), those outside the k likeliest and outside their nucleus of mass p set to -inf."""
    v = logits.shape[-1]
    order = jnp.argsort(logits, -1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, -1)
    k = jnp.where(jnp.asarray(top_k) > 0, top_k, v)
    within = jnp.arange(v) < k
    mass = jnp.cumsum(jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), -1), -1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))  # mass of all that are likelier
    within = within & ((before < top_p) | (jnp.asarray(top_p) >= 1))
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, within, -1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)
