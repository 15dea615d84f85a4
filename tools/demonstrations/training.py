"""Training as the demonstrations do it: all steps in one `lax.scan`, all random starts side by side."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax import Array


def fit(
    loss: Callable[[Any], Array], params: Any, steps: int, optimizer: optax.GradientTransformation, keep: bool = True
) -> tuple[Any, Any]:
    """Minimise `loss(params)`.

    Returns:
      The last parameters, and those before each step with a leading axis (steps,), or None without `keep`.
    """

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), params if keep else None

    (last, _), path = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return last, path


def starts(make: Callable[[nnx.Rngs], nnx.Module], seed: int, count: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the graph of the module that `make` builds, and the parameters of `count` random starts, stacked."""
    graph = nnx.graphdef(make(nnx.Rngs(0)))
    return graph, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(jax.random.key(seed), count))
