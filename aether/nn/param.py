"""How a parameter is born: a value, and the logical names of its axes.

The names are `vocab`, `embed`, `heads`, `mlp`, `position` and `layers`; `aether/parallel.py` maps them to the mesh.
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Axes = tuple[str | None, ...]
Initializer = Callable[..., Array]  # (key, shape, dtype) -> array, as in `jax.nn.initializers`
M = TypeVar("M", bound=nnx.Module)


class FrozenParam(nnx.Variable):
    """An array that is saved with the parameters and not trained: `nnx.Param` does not select it."""


def check_sizes(**sizes: int) -> None:
    """Raise a `ValueError` that names the first of `sizes` that is no integer above 0."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be an integer of at least 1.")


def compute_dtype(dtype: str) -> str:
    """Return `dtype` if it names a floating dtype; ValueError otherwise."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype is {dtype!r}; it must be a floating dtype, such as float32 or bfloat16.")
    return dtype


def normal(key: Array, shape: tuple[int, ...], std: float, axes: Axes) -> nnx.Param:
    """Make a float32 parameter with entries from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def constant(shape: tuple[int, ...], value: float, axes: Axes) -> nnx.Param:
    """Make a float32 parameter whose entries are all `value`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def pad_axis(param: nnx.Variable, axis: int, size: int) -> None:
    """Append zeros to an axis of a parameter until it is `size` long; what is drawn for it stays the same."""
    value = param[...]
    after = [(0, size - n if k == axis else 0) for k, n in enumerate(value.shape)]
    param.set_value(jnp.pad(value, after))


def softplus_inverse(value: float) -> float:
    """Return r with softplus(r) = log(1 + eʳ) = value, for value > 0."""
    return value + math.log(-math.expm1(-value))


def stack(make: Callable[[nnx.Rngs], M], n: int, rngs: nnx.Rngs) -> M:
    """Make `n` modules as one whose parameters have a leading "layers" axis, each layer from a key of its own.

    `nnx.vmap` could do this, but loses the name of the new axis in tree mode.
    """

    def one(key: Array) -> nnx.State:
        return nnx.state(make(nnx.Rngs(key)))

    states = jax.vmap(one)(jax.random.split(rngs(), n))
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    state = jax.tree.map(
        lambda v: v.replace(axes=("layers", *v.get_metadata()["axes"])),
        states,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    nnx.update(module, state)
    return module
