"""What every ⵟ layer learns beside its prototypes, and the dense ⵟ layer."""

import math
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels.yat import check_distance, check_epsilon, ill_conditioned, unit, yat
from aether.nn.param import Axes, Initializer, compute_dtype, constant, softplus_inverse
from aether.nn.prototypes import KernelOptions, Prototypes, draw_prototypes, operand


class UnitOptions(TypedDict, total=False):
    """What b, α and ε of a ⵟ unit are; names are nmn's."""

    use_bias: bool
    """Have a bias b; True by default."""
    constant_bias: float | None
    """Fix b at this number."""
    softplus_bias: bool
    """b = softplus(bias) ≥ 0: the kernel is positive semi-definite, and universal for b > 0; needs less memory too."""
    scalar_bias: bool
    """One b for the layer instead of one a unit."""
    bias_init: float | Initializer
    """The initial b, or an initialiser of the stored `bias`; that is 0 by default."""
    use_alpha: bool
    """Have an output scale α; True by default."""
    constant_alpha: bool | float | None
    """Fix α at this number; True means √2, False is as None: learn it."""
    alpha_init: float | Initializer
    """The initial α; 1 by default."""
    epsilon: float
    """ε > 0, its initial value if it is learned; 1e-5 by default."""
    learnable_epsilon: bool
    """ε = softplus(epsilon_param)."""


class LayerOptions(UnitOptions, KernelOptions, total=False):
    """All options that ⵟ layers share."""


class YatUnit(nnx.Module):
    """The base of ⵟ layers: b from `bias`, α from `alpha`, ε from `epsilon_param`, each learned, constant or absent."""

    def init_unit(
        self,
        bias_shape: tuple[int, ...],
        shape: tuple[int, ...],
        axes: Axes,
        *,
        use_bias: bool = True,
        constant_bias: float | None = None,
        softplus_bias: bool = False,
        scalar_bias: bool = False,
        bias_init: float | Initializer = jax.nn.initializers.zeros,
        use_alpha: bool = True,
        constant_alpha: bool | float | None = None,
        alpha_init: float | Initializer = 1.0,
        epsilon: float = 1e-5,
        learnable_epsilon: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Create what is learned; the options are those of `UnitOptions`, `axes` name those of the bias.

        Raises:
          ValueError: ε, a constant or an initial value is out of its range, or two options exclude one another.
        """
        check_epsilon(epsilon)
        _check_finite(
            constant_bias=constant_bias, bias_init=bias_init, constant_alpha=constant_alpha, alpha_init=alpha_init
        )
        if not use_bias and (softplus_bias or scalar_bias):
            raise ValueError(
                f"softplus_bias is {softplus_bias} and scalar_bias {scalar_bias} without a bias; have one."
            )
        constant_alpha = None if constant_alpha is False else constant_alpha
        if constant_bias is not None and (softplus_bias or scalar_bias or not use_bias):
            raise ValueError(
                f"constant_bias is {constant_bias} and use_bias, softplus_bias, scalar_bias are {use_bias}, "
                f"{softplus_bias}, {scalar_bias}; a constant bias goes with True, False, False alone."
            )
        if use_bias and softplus_bias and not callable(bias_init) and bias_init <= 0:
            raise ValueError(f"bias_init is {bias_init} with softplus_bias, whose values are above 0; give such a one.")
        shared: Axes = axes if shape == bias_shape else (None,) * len(shape)
        where: tuple[tuple[int, ...], Axes] = ((1,), (None,)) if scalar_bias else (bias_shape, axes)
        raw = softplus_inverse(bias_init) if use_bias and softplus_bias and not callable(bias_init) else bias_init
        self.bias = _start(raw, *where, rngs) if use_bias and constant_bias is None else None
        self.alpha = _start(alpha_init, shape, shared, rngs) if use_alpha and constant_alpha is None else None
        self.epsilon_param = constant(shape, softplus_inverse(epsilon), shared) if learnable_epsilon else None
        self.softplus_bias = softplus_bias
        self.constant_bias = constant_bias or 0.0
        fixed = 1.0 if constant_alpha is None else float(constant_alpha)
        self.constant_alpha = math.sqrt(2.0) if constant_alpha is True else fixed
        self.epsilon = epsilon

    def unit(self) -> dict[str, Any]:
        """Return b, α and ε as the keyword arguments of `aether.kernels.yat.yat`."""
        bias: Array | float = self.constant_bias
        if self.bias is not None:
            bias = jax.nn.softplus(self.bias[...]) if self.softplus_bias else self.bias[...]
        return dict(
            bias=bias,
            alpha=self.constant_alpha if self.alpha is None else self.alpha[...],
            epsilon=self.epsilon if self.epsilon_param is None else jax.nn.softplus(self.epsilon_param[...]),
            nonnegative_bias=self.softplus_bias or (self.bias is None and self.constant_bias >= 0),
        )


def _check_finite(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, int | float) and not math.isfinite(number):
            raise ValueError(f"{name} is {number}; it must be finite.")


def _start(init: float | Initializer, shape: tuple[int, ...], axes: Axes, rngs: nnx.Rngs) -> nnx.Param:
    if callable(init):
        return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)
    return constant(shape, init, axes)


def unit_options(options: LayerOptions) -> UnitOptions:
    """Return those of `options` that `YatUnit.init_unit` takes."""
    return {k: v for k, v in options.items() if k in UnitOptions.__annotations__}  # type: ignore[return-value]


def kernel_options(options: LayerOptions) -> KernelOptions:
    """Return those of `options` that `YatUnit.init_unit` does not take."""
    return {k: v for k, v in options.items() if k not in UnitOptions.__annotations__}  # type: ignore[return-value]


class YatNMN(YatUnit, Prototypes):
    """y_j = α (x·w_j + b_j)² / (max(‖x‖² + ‖w_j‖² − 2 x·w_j, 0) + ε), w_j the columns of `kernel`.

    The name, and those of the parameters, are nmn's: `kernel` (in, out), `bias` (out,) or (1,), `alpha` (1,),
    `epsilon_param` (1,). A linear map should follow: two ⵟ layers in a row train badly.

    Args:
      in_features: width of x.
      out_features: number of units.
      spherical: compare the directions of x and w_j only: both become unit vectors, D = 2 − 2 cos.
      distance: "expanded", as above, on the matrix unit; "exact", by differences, where prototypes come near their
        inputs with a small ε (`ill_conditioned` counts such pairs) and for second derivatives.
      axes: logical names of the kernel's two axes.
      dtype: compute dtype; parameters are float32.
      rngs: source of the initial parameters.
      **options: see `UnitOptions` and `KernelOptions`.

    Raises:
      ValueError: an option is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        spherical: bool = False,
        distance: str = "expanded",
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
        **options: Unpack[LayerOptions],
    ):
        self.init_kernel((in_features, out_features), axes, rngs=rngs, **kernel_options(options))
        self.init_unit((out_features,), (1,), axes[1:], rngs=rngs, **unit_options(options))
        self.spherical = spherical
        self.distance = check_distance(distance)
        self.dtype = compute_dtype(dtype)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """Map (..., in_features) to (..., out_features), float32 accumulation, in the compute dtype.

        With a `key`, DropConnect masks the kernel; another one is needed for each call.
        """
        x = operand(x, self.kernel_shape[0], self.dtype)
        kernel = self.prototypes(key, self.dtype)
        rows = x[None] if x.ndim == 1 else x
        y = yat(rows, kernel, spherical=self.spherical, distance=self.distance, **self.unit())
        return y[0] if x.ndim == 1 else y

    def init_from_data(self, x: Array, key: Array, *, method: str = "kmeans++", noise: float = 0.0) -> None:
        """Make rows of `x` (..., in_features) the prototypes; arguments and errors of `draw_prototypes`."""
        x = operand(x, self.kernel_shape[0], "float32")
        self.set_prototypes(draw_prototypes(x, self.kernel_shape[1], key, method=method, noise=noise))

    def ill_conditioned(self, x: Array, threshold: float = 1e3) -> Array:
        """Count the pairs of `x` (..., in_features) and a prototype for which the expanded distance loses `threshold`.

        See `aether.kernels.yat.ill_conditioned`; a debugging aid, as slow as the exact distance.
        """
        x = operand(x, self.kernel_shape[0], self.dtype)
        x, kernel = x.reshape(-1, x.shape[-1]), self.prototypes(None, self.dtype)
        if self.spherical:
            x, kernel = unit(x), unit(kernel, 0)
        return ill_conditioned(x, kernel, self.unit()["epsilon"], threshold)
