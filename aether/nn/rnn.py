"""Recurrent ⵟ cells, for `nnx.RNN` and for `jax.lax.scan`.

Each gate is a squashed sum of two ⵟ responses, to the input and to the hidden state; both maps hold the units of all
gates side by side. The responses are never negative for α ≥ 0, so gates are softer sigmoids and candidates soft
tanhs; should a learned α become negative, a negative sum counts as 0 (`aether.kernels.squash`).

Starting values. For inputs of unit variance prototypes are as long as the inputs, entries from N(0, 1), with b = √d,
α = ½, ε = 1: then y ≈ (g + 1)²/4 with g ~ N(0, 1), ½ on average at any width d. Unit vectors (`spherical`) have b = 1,
α = 1, ε = 0.1. Hidden states have entries of about ½ or less: their prototypes are orthogonal, of length √h/2, with
b = √h/4, α = 2, ε = 1, which is ½ both at a zero state and on average. Sums start near 1, where a sigmoid is ½ and a
soft tanh 0. For the gate that keeps the state, the LSTM's f and the GRU's z, the bias for the input is five times as
large: it starts near 0.88, without which neither cell learned to remember a token over 30 steps (in 600 of Adam).
"""

import math
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.kernels.squash import soft_tanh, softer_sigmoid
from aether.nn.param import Initializer, compute_dtype, softplus_inverse
from aether.nn.yat import UnitOptions, YatNMN

_ALPHA_OPTIONS = {"use_alpha", "constant_alpha", "alpha_init"}


class YatCell(nnx.RNNCellBase):
    """The base of the cells: the two maps `dense_i` and `dense_h`, the first state, and checks.

    Args:
      in_features: width of an input.
      hidden_features: width of the hidden state.
      spherical: compare the directions of inputs and prototypes only. Hidden states are always compared whole: the
        direction of one that starts at 0 is undefined, and near 0 its gradient is without bound.
      distance: "expanded" or "exact", as in `YatNMN`.
      kernel_init: of the prototypes for the input.
      recurrent_kernel_init: of the prototypes for the hidden state.
      axes: logical names of the axes of both kernels.
      dtype: compute dtype of the maps and of the outputs; the state that is carried is float32.
      rngs: source of the initial parameters.
      **options: see `UnitOptions`, for both maps. By default b is learned, positive by softplus, and α constant;
        `use_alpha=True` learns it too. Starting values as above.

    Raises:
      ValueError: a size is below 1, or an option out of its range.
    """

    boosts: ClassVar[tuple[float, ...]]  # the initial bias for the input of each gate, relative to the usual one

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        spherical: bool = False,
        distance: str = "expanded",
        kernel_init: Initializer | None = None,
        recurrent_kernel_init: Initializer | None = None,
        axes: tuple[str, str] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
        **options: Unpack[UnitOptions],
    ):
        if in_features < 1 or hidden_features < 1:
            raise ValueError(
                f"in_features and hidden_features are {in_features} and {hidden_features}; both must be at least 1."
            )
        shared: dict[str, Any] = dict(distance=distance, axes=axes, dtype=dtype, rngs=rngs)
        width, gates = hidden_features, len(self.boosts)
        start = (1.0, 1.0, 0.1) if spherical else (math.sqrt(in_features), 0.5, 1.0)
        self.dense_i = YatNMN(
            in_features,
            gates * width,
            spherical=spherical,
            kernel_init=kernel_init or jax.nn.initializers.normal(1.0),
            **shared,
            **_start(options, *start, np.repeat(self.boosts, width)),
        )
        start = (math.sqrt(width) / 4, 2.0, 1.0)
        self.dense_h = YatNMN(
            width,
            gates * width,
            kernel_init=recurrent_kernel_init or _orthogonal(gates),
            **shared,
            **_start(options, *start, np.ones(gates * width)),
        )
        self.hidden_features = hidden_features
        self.dtype = compute_dtype(dtype)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """Return the first state for inputs of `input_shape` (..., in_features): float32 zeros, or from `carry_init`.

        Raises:
          ValueError: a `carry_init` without `rngs`.
        """
        shape = (*input_shape[:-1], self.hidden_features)
        if carry_init is None:
            return jnp.zeros(shape, jnp.float32)
        if rngs is None:
            raise ValueError("carry_init is given and rngs is None; pass the nnx.Rngs that it draws from.")
        return carry_init(rngs.carry() if isinstance(rngs, nnx.Rngs) else rngs(), shape, jnp.float32)

    @property
    def num_feature_axes(self) -> int:
        """How many of an input's last axes are features."""
        return 1

    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """Take one step with `inputs` (..., in_features): return the new carry, and the output (..., hidden_features).

        Raises:
          ValueError: the shape of `inputs`, or of `carry`, is not what the cell was made for.
        """
        return self.advance(carry, self.dense_i(inputs))

    def advance(self, carry: Any, mapped: Array) -> tuple[Any, Array]:
        """Take one step with `mapped`, the responses `dense_i(inputs)`, which do not depend on the state."""
        raise NotImplementedError(f"{type(self).__name__} must define advance(carry, mapped).")

    def respond(self, h: Array, mapped: Array) -> tuple[list[Array], list[Array]]:
        """Return the float32 responses of each gate to the input and to the hidden state `h`."""
        shape = (*mapped.shape[:-1], self.hidden_features)
        if h.shape != shape:
            raise ValueError(f"carry is {h.shape} and the inputs ask for {shape}; use initialize_carry(inputs.shape).")
        gates = len(self.boosts)
        parts = (jnp.split(y.astype(jnp.float32), gates, -1) for y in (mapped, self.dense_h(h)))
        return next(parts), next(parts)


class YatSimpleCell(YatCell):
    """h' = soft tanh(ⵟ(x) + ⵟ(h)); carry and output are h'. Arguments as in `YatCell`."""

    boosts = (1.0,)

    def advance(self, carry: Array, mapped: Array) -> tuple[Array, Array]:
        """Take one step with the responses to the input; see `YatCell.advance`."""
        (x,), (h,) = self.respond(carry, mapped)
        state = soft_tanh(x + h)
        return state, state.astype(self.dtype)


class YatGRUCell(YatCell):
    """h' = (1 − z) n + z h; carry and output are h'. Arguments as in `YatCell`.

    r, z = softer sigmoid(ⵟ(x) + ⵟ(h)) and n = soft tanh(ⵟ(x) + r ⵟ(h)), in this order in the kernels. The form is that
    of `nnx.GRUCell` (arXiv 1406.1078).
    """

    boosts = (1.0, 5.0, 1.0)

    def advance(self, carry: Array, mapped: Array) -> tuple[Array, Array]:
        """Take one step with the responses to the input; see `YatCell.advance`."""
        (xr, xz, xn), (hr, hz, hn) = self.respond(carry, mapped)
        z = softer_sigmoid(xz + hz)
        state = (1.0 - z) * soft_tanh(xn + softer_sigmoid(xr + hr) * hn) + z * carry
        return state, state.astype(self.dtype)


class YatLSTMCell(YatCell):
    """c' = f c + i g, h' = o · c'/(1 + |c'|); the carry is (c', h'), the output h'. Arguments as in `YatCell`.

    i, f, o = softer sigmoid(ⵟ(x) + ⵟ(h)) and g = soft tanh(ⵟ(x) + ⵟ(h)), in the kernels in the order i, f, g, o
    (Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et al., 2000). c' may be negative, where soft tanh
    is not defined: softsign is odd, bounded by 1, and like the other squashers here its slope falls as 1/c², not
    exponentially, so that a full cell still learns.
    """

    boosts = (1.0, 5.0, 1.0, 1.0)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> tuple[Array, Array]:
        """Return the first (c, h); see `YatCell.initialize_carry`."""
        c = super().initialize_carry(input_shape, rngs, carry_init)
        return c, super().initialize_carry(input_shape, rngs, carry_init)

    def advance(self, carry: tuple[Array, Array], mapped: Array) -> tuple[tuple[Array, Array], Array]:
        """Take one step with the responses to the input; see `YatCell.advance`."""
        c, h = carry
        i, f, g, o = (x + h for x, h in zip(*self.respond(h, mapped), strict=True))
        c = softer_sigmoid(f) * c + softer_sigmoid(i) * soft_tanh(g)
        h = softer_sigmoid(o) * jax.nn.soft_sign(c)
        return (c, h), h.astype(self.dtype)


def scan(cell: YatCell, xs: Array, carry: Any = None, *, reverse: bool = False) -> tuple[Any, Array]:
    """Run `cell` over xs (..., time, in_features): return the last carry, and the outputs (..., time, hidden_features).

    What `nnx.RNN(cell, return_carry=True)` computes, under plain JAX transforms, and faster: the inputs are mapped all
    at once, for (..., time, gates · hidden_features) numbers. `carry` starts as zeros; `reverse` goes from the last
    time to the first, and the outputs keep the order of the inputs.
    """
    if xs.ndim < 2:
        raise ValueError(f"xs is {xs.shape}; it must be (..., time, in_features).")
    if carry is None:
        carry = cell.initialize_carry(xs.shape[:-2] + xs.shape[-1:])
    carry = jax.tree.map(lambda c: c.astype(jnp.float32), carry)
    mapped = jnp.moveaxis(cell.dense_i(xs), -2, 0)
    carry, ys = jax.lax.scan(cell.advance, carry, mapped, reverse=reverse)
    return carry, jnp.moveaxis(ys, 0, -2)


def _start(options: UnitOptions, bias: float, alpha: float, epsilon: float, boosts: np.ndarray) -> dict[str, Any]:
    """Return `options` with a cell's starting values where they leave them open."""
    given: dict[str, Any] = {"epsilon": epsilon, "alpha_init": alpha} | dict(options)
    if not _ALPHA_OPTIONS & options.keys():
        given["constant_alpha"] = alpha
    if given.get("use_bias", True) and given.get("constant_bias") is None:
        softplus = given.setdefault("softplus_bias", True)
        starts = np.full(1, bias) if given.get("scalar_bias") else bias * boosts
        stored = np.array([softplus_inverse(b) for b in starts]) if softplus else starts
        given.setdefault("bias_init", lambda key, shape, dtype: jnp.asarray(stored, dtype))
    return given


def _orthogonal(gates: int) -> Initializer:
    """Return an initialiser of (h, gates · h): for each gate orthogonal columns of length √h/2."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        width = shape[0]
        draw = jax.nn.initializers.orthogonal(math.sqrt(width) / 2)
        return jnp.concatenate([draw(k, (width, width), dtype) for k in jax.random.split(key, gates)], 1)

    return init
