"""The prototypes of a ⵟ layer: where they come from (initialisers, data, a shared bank), what a call does to them."""

from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels.yat import unit
from aether.nn.param import Axes, FrozenParam, Initializer, check_sizes

_SEEDINGS = ("sample", "kmeans++")


class KernelOptions(TypedDict, total=False):
    """How the prototypes, the columns of `kernel`, are made and used; names are nmn's."""

    kernel_init: Initializer
    """Of `jax.nn.initializers`; by default N(0, 1/fan_in), so that prototypes start near unit length. A standard
    deviation of 1 makes them as long as inputs of unit variance ("prototype scale")."""
    positive_init: bool
    """Take the absolute value of the initial entries."""
    weight_normalized: bool
    """Use unit columns, w/‖w‖."""
    drop_rate: float
    """DropConnect, in calls that pass a `key`: each entry of the kernel is 0 with this probability p, the others are
    divided by 1 − p (Wan et al., 2013), before any normalisation."""
    freeze_kernel: bool
    """Keep the kernel as a `FrozenParam`, which is not trained."""
    kernel_bank: "KernelBank | None"
    """Use the first columns of another module's kernel instead of a kernel of its own."""


class KernelBank(nnx.Module):
    """A kernel that several ⵟ layers share, each taking as many of its columns as it has units.

    Args:
      shape: (in_features, size), or (k…, in_features/groups, size) for convolutions.
      axes: logical names of the axes; ("embed", "mlp"), preceded by None, by default.
      freeze_kernel: do not train it.
      kernel_init: see `KernelOptions`.
      rngs: source of the initial kernel.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        axes: Axes | None = None,
        freeze_kernel: bool = False,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        init = kernel_init or default_init()
        kind = FrozenParam if freeze_kernel else nnx.Param
        axes = axes or (None,) * (len(shape) - 2) + ("embed", "mlp")
        self.kernel = kind(init(rngs.params(), shape, jnp.float32), axes=axes)


class Prototypes(nnx.Module):
    """The base of layers that have a kernel (..., in, out) whose columns are prototypes."""

    def init_kernel(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        kernel_init: Initializer | None = None,
        positive_init: bool = False,
        weight_normalized: bool = False,
        drop_rate: float = 0.0,
        freeze_kernel: bool = False,
        kernel_bank: KernelBank | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Create `kernel`, or keep `kernel_bank`; the options are those of `KernelOptions`.

        Raises:
          ValueError: a size is below 1, `drop_rate` is not in [0, 1), or the bank does not fit these options.
        """
        check_sizes(in_features=shape[-2], out_features=shape[-1])
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate is {drop_rate}; it must be in [0, 1).")
        self.kernel_shape = shape
        self.weight_normalized = weight_normalized
        self.drop_rate = drop_rate
        self.kernel_bank = kernel_bank
        if kernel_bank is not None:
            if kernel_init is not None or positive_init or freeze_kernel:
                raise ValueError(
                    "kernel_bank is given with kernel_init, positive_init or freeze_kernel; those are the bank's own."
                )
            bank = kernel_bank.kernel[...].shape
            if bank[:-1] != shape[:-1] or bank[-1] < shape[-1]:
                raise ValueError(f"kernel_bank is {bank}, the layer needs {shape}; only the last axis may be longer.")
            return
        kernel = (kernel_init or default_init())(rngs.params(), shape, jnp.float32)
        kind = FrozenParam if freeze_kernel else nnx.Param
        self.kernel = kind(jnp.abs(kernel) if positive_init else kernel, axes=axes)

    def raw_kernel(self) -> Array:
        """Return the float32 kernel as it is stored."""
        if self.kernel_bank is not None:
            return self.kernel_bank.kernel[...][..., : self.kernel_shape[-1]]
        return self.kernel[...]

    def prototypes(self, key: Array | None, dtype: str) -> Array:
        """Return the kernel as the ⵟ-product takes it: entries dropped if there is a key, normalised, in `dtype`."""
        kernel = self.raw_kernel()
        if key is not None and self.drop_rate:
            keep = 1.0 - self.drop_rate
            kernel = jnp.where(jax.random.bernoulli(key, keep, kernel.shape), kernel / keep, 0.0)
        if self.weight_normalized:
            kernel = unit(kernel, tuple(range(kernel.ndim - 1)))
        return kernel.astype(dtype)

    def set_prototypes(self, vectors: Array) -> None:
        """Overwrite the layer's kernel, or its columns of the bank, with the rows of `vectors` (out, in)."""
        kernel = vectors.T.reshape(self.kernel_shape).astype(jnp.float32)
        home = self.kernel if self.kernel_bank is None else self.kernel_bank.kernel
        home[...] = home[...].at[..., : kernel.shape[-1]].set(kernel)


def default_init() -> Initializer:
    """Return the initialiser with entries from N(0, 1/fan_in): the expected length of a prototype is 1."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def draw_prototypes(x: Array, count: int, key: Array, *, method: str = "kmeans++", noise: float = 0.0) -> Array:
    """Choose `count` rows of `x` as prototypes.

    Args:
      x: (..., d); all leading axes are rows.
      count: how many to choose, no row twice.
      key: of the choice.
      method: "sample": at random; "kmeans++": each with probability proportional to its squared distance from the
        nearest one chosen before (Arthur and Vassilvitskii, 2007), which spreads them.
      noise: standard deviation, in units of x's own, of what is added: a prototype that equals its input responds
        with α (‖x‖² + b)²/ε.

    Returns:
      (count, d), float32.

    Raises:
      ValueError: there are fewer rows than `count`, or `method` is neither.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if len(x) < count:
        raise ValueError(f"x has {len(x)} rows and {count} prototypes are to be drawn; give at least as many rows.")
    if not 0.0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}; it must be finite and not negative.")
    if method not in _SEEDINGS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(_SEEDINGS)}.")
    choose, shake = jax.random.split(key)
    rows = (
        jax.random.choice(choose, len(x), (count,), replace=False) if method == "sample" else _spread(x, count, choose)
    )
    return x[rows] + noise * jnp.std(x) * jax.random.normal(shake, (count, x.shape[-1]))


def _spread(x: Array, count: int, key: Array) -> Array:
    """Return the rows that k-means++ seeding chooses."""
    first, *rest = jax.random.split(key, count)
    start = jax.random.randint(first, (), 0, len(x))

    def choose(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        nearest, row = carry
        nearest = jnp.minimum(nearest, jnp.sum((x - x[row]) ** 2, -1)).at[row].set(-1.0)
        weights = jnp.where(
            nearest > 0, nearest, jnp.where(nearest < 0, 0.0, 1e-30)
        )  # equal rows: only as a last resort
        row = jax.random.categorical(key, jnp.log(weights))
        return (nearest, row), row

    if not rest:
        return start[None]
    _, rows = jax.lax.scan(choose, (jnp.full(len(x), jnp.inf), start), jnp.stack(rest))
    return jnp.concatenate([start[None], rows])


def operand(x: Array, features: int, dtype: str) -> Array:
    """Return `x` in the compute dtype.

    Raises:
      ValueError: its last axis is not `features` wide, or it holds no floating numbers.
    """
    if x.shape[-1:] != (features,):
        raise ValueError(f"x is {x.shape} and in_features is {features}; the last axis of x must be in_features wide.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; cast it to a floating dtype such as {dtype}.")
    return x.astype(dtype)
