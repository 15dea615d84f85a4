"""The dense ⵟ layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels.yat import yat
from aether.nn.param import Axes, constant, normal, softplus_inverse


class YatUnit(nnx.Module):
    """What a ⵟ layer learns beside its prototypes: b = softplus(bias) ≥ 0, α, and ε = softplus(epsilon_param) > 0."""

    def init_unit(
        self,
        bias_shape: tuple[int, ...],
        shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: float,
        alpha: float,
        epsilon: float,
    ) -> None:
        """Create `bias` (none if it starts at 0), `alpha` and `epsilon_param`; `axes` name those of the bias."""
        self.bias = constant(bias_shape, softplus_inverse(bias), axes) if bias else None
        shared: Axes = axes if shape == bias_shape else (None,) * len(shape)
        self.alpha = constant(shape, alpha, shared)
        self.epsilon_param = constant(shape, softplus_inverse(epsilon), shared)

    def unit(self) -> dict[str, Any]:
        """Return b, α and ε as the keyword arguments of `aether.kernels.yat.yat`."""
        bias = jnp.zeros_like(self.alpha[...]) if self.bias is None else jax.nn.softplus(self.bias[...])
        return dict(bias=bias, alpha=self.alpha[...], epsilon=jax.nn.softplus(self.epsilon_param[...]))


class YatNMN(YatUnit):
    """y_j = α (x·w_j + b_j)² / (max(‖x‖² + ‖w_j‖² − 2 x·w_j, 0) + ε), w_j the columns of `kernel`.

    The name, and those of the parameters, are nmn's. A linear map should follow: two ⵟ layers in a row train badly.

    Args:
      in_features: width of x.
      out_features: number of units.
      bias: initial b; 0 leaves the bias out.
      alpha: initial α, one for the layer.
      epsilon: initial ε, one for the layer.
      spherical: compare the directions of x and w_j only.
      std: standard deviation of the initial kernel; 1/√in_features by default, so that ‖w_j‖ ≈ 1.
      axes: logical names of the kernel's two axes.
      dtype: compute dtype.
      rngs: source of the initial kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: float = 0.1,
        alpha: float = 1.0,
        epsilon: float = 1e-5,
        spherical: bool = False,
        std: float | None = None,
        axes: tuple[str, str] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        std = in_features**-0.5 if std is None else std
        self.kernel = normal(rngs.params(), (in_features, out_features), std, axes)
        self.init_unit((out_features,), (1,), axes[1:], bias=bias, alpha=alpha, epsilon=epsilon)
        self.spherical = spherical
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Map (..., in_features) to (..., out_features), float32 accumulation, in the compute dtype."""
        return yat(x.astype(self.dtype), self.kernel[...].astype(self.dtype), spherical=self.spherical, **self.unit())
