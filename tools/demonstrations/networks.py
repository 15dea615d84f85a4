"""The small classifiers of the demonstrations: one layer, or one hidden layer and a linear map."""

import jax
from flax import nnx
from jax import Array

from aether.nn import Linear, YatNMN

EPSILON = 1.0


class Hidden(nnx.Module):
    """Two numbers in, `hidden` units (ⵟ, or linear and ReLU), a linear map to `classes` logits."""

    def __init__(self, kind: str, hidden: int, classes: int, *, rngs: nnx.Rngs):
        self.hidden = layer(kind, hidden, rngs=rngs)
        self.out = Linear(hidden, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (..., 2) to (..., classes)."""
        units = self.hidden(x)
        return self.out(units if isinstance(self.hidden, YatNMN) else jax.nn.relu(units))


def layer(kind: str, units: int, *, rngs: nnx.Rngs) -> Linear | YatNMN:
    """Return a layer of ⵟ units with ε = 1 or, if `kind` is "linear", of linear ones."""
    return Linear(2, units, rngs=rngs) if kind == "linear" else YatNMN(2, units, epsilon=EPSILON, rngs=rngs)
