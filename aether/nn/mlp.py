"""The block that a ⵟ layer is made for: a linear map of its responses."""

from typing import Unpack

from flax import nnx
from jax import Array

from aether.kernels.yat import yat_mlp
from aether.nn.linear import Linear
from aether.nn.prototypes import operand
from aether.nn.yat import LayerOptions, YatNMN


class YatMLP(nnx.Module):
    """out(hidden(x)): Σ_j v_j α (x·w_j + b_j)² / (‖x − w_j‖² + ε), `hidden` a `YatNMN` and `out` a `Linear`.

    The same numbers as the two layers one after the other, and a gradient that keeps one number a hidden unit instead
    of two (`aether.kernels.yat.yat_mlp`); with `distance="exact"` it is the two layers.

    Args:
      in_features: width of x.
      hidden_features: number of ⵟ units.
      out_features: width of the result; `in_features` by default.
      out_bias: have a bias in the linear map.
      out_std: standard deviation of its initial kernel; 1/√hidden_features by default.
      spherical: compare the directions of x and w_j only.
      distance: see `YatNMN`.
      dtype: compute dtype; parameters are float32.
      rngs: source of the initial parameters.
      **options: of the ⵟ units; see `UnitOptions` and `KernelOptions`.

    Raises:
      ValueError: an option is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        out_bias: bool = True,
        out_std: float | None = None,
        spherical: bool = False,
        distance: str = "expanded",
        dtype: str = "float32",
        rngs: nnx.Rngs,
        **options: Unpack[LayerOptions],
    ):
        out_features = in_features if out_features is None else out_features
        how = dict(spherical=spherical, distance=distance, dtype=dtype)
        self.hidden = YatNMN(in_features, hidden_features, **how, rngs=rngs, **options)  # type: ignore[arg-type]
        self.out = Linear(
            hidden_features, out_features, std=out_std, use_bias=out_bias, axes=("mlp", "embed"), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """Map (..., in_features) to (..., out_features); a `key` is for DropConnect, as in `YatNMN`."""
        hidden, dtype = self.hidden, self.hidden.dtype
        if hidden.distance == "exact":
            return self.out(hidden(x, key=key))
        x = operand(x, hidden.kernel_shape[0], dtype)
        rows = x[None] if x.ndim == 1 else x
        out = self.out.kernel[...].astype(dtype)
        y = yat_mlp(rows, hidden.prototypes(key, dtype), out, spherical=hidden.spherical, **hidden.unit())
        y = y[0] if x.ndim == 1 else y
        return y if self.out.bias is None else y + self.out.bias[...].astype(dtype)
