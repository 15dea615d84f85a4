"""The linear parts: dense maps, convolutions, embedding tables, layer normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels.conv import channels_last
from aether.kernels.window import CONV_PADDINGS, Padding, Sizes, check_padding, conv_window, per_axis
from aether.nn.param import Initializer, check_sizes, compute_dtype, constant, normal
from aether.nn.prototypes import default_init


class Linear(nnx.Module):
    """y = x·kernel + bias over the last axis.

    Args:
      in_features: width of x.
      out_features: width of y.
      std: standard deviation of the initial kernel; 1/√in_features by default.
      use_bias: add a bias, 0 at first.
      axes: logical names of the kernel's two axes; None for one that no mesh axis splits.
      dtype: compute dtype; the product accumulates in float32.
      rngs: source of the initial kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float | None = None,
        use_bias: bool = True,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        std = in_features**-0.5 if std is None else std
        self.kernel = normal(rngs.params(), (in_features, out_features), std, axes)
        self.bias = constant((out_features,), 0.0, axes[1:]) if use_bias else None
        self.dtype = compute_dtype(dtype)

    def __call__(self, x: Array) -> Array:
        """Map (..., in_features) to (..., out_features) in the compute dtype."""
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embed(nnx.Module):
    """A table of vectors, read by index.

    Args:
      num_embeddings: rows.
      features: width of a row.
      std: standard deviation of the initial rows.
      axes: logical names of the two axes.
      rngs: source of the initial rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        std: float,
        axes: tuple[str, str] = ("vocab", "embed"),
        rngs: nnx.Rngs,
    ):
        self.embedding = normal(rngs.params(), (num_embeddings, features), std, axes)

    def __call__(self, ids: Array) -> Array:
        """Return the float32 rows of `ids`, (..., features)."""
        return jnp.take(self.embedding[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """(x − mean) / √(variance + epsilon) · scale + bias over the last axis, in float32 (Ba et al., 2016).

    Args:
      features: width of x.
      use_bias: add a learned bias, 0 at first.
      epsilon: added to the variance.
      dtype: of the result.
    """

    def __init__(self, features: int, *, use_bias: bool = True, epsilon: float = 1e-5, dtype: str = "float32"):
        self.scale = constant((features,), 1.0, ("embed",))
        self.bias = constant((features,), 0.0, ("embed",)) if use_bias else None
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Normalise (..., features)."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, -1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(self.dtype)


class Conv(nnx.Module):
    """y = patch·kernel + bias of every patch of x; the zeros of padding are entries of the patch.

    Args:
      in_features: channels of x.
      out_features: channels of y.
      kernel_size: of the window, one number for each spatial axis; a single integer is a window over one axis, as in
        `flax.nnx.Conv` and `aether.nn.YatConv`.
      strides: steps of the window; one number, or one for each axis.
      padding: as in `aether.nn.YatConv`.
      kernel_init: of `jax.nn.initializers`; N(0, 1/fan_in) by default.
      zero_sum: use each kernel less its mean over places and channels, so that y does not see a number that is added to
        all entries of x: what weight standardization does without its scale (Brock et al., 2021, arXiv 2101.08692).
      use_bias: add a bias, 0 at first.
      axes: logical names of the kernel's last two axes.
      dtype: compute dtype; parameters are float32.
      rngs: source of the initial kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sizes,
        strides: Sizes | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_init: Initializer | None = None,
        zero_sum: bool = False,
        use_bias: bool = True,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        n = len(size)
        shape = (*per_axis(size, n, "kernel_size"), in_features, out_features)
        init = kernel_init or default_init()
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32), axes=(None,) * n + axes)
        self.bias = constant((out_features,), 0.0, axes[1:]) if use_bias else None
        self.strides = per_axis(strides, n, "strides")
        self.padding = check_padding(padding, n, CONV_PADDINGS)
        self.zero_sum, self.dtype = zero_sum, compute_dtype(dtype)

    def __call__(self, x: Array) -> Array:
        """Map (b, spatial..., in_features) to (b, places..., out_features) in the compute dtype."""
        kernel = self.kernel[...]
        if self.zero_sum:
            kernel = kernel - jnp.mean(kernel, tuple(range(kernel.ndim - 1)), keepdims=True)
        kernel = kernel.astype(self.dtype)
        x, window = conv_window(x.astype(self.dtype), kernel.shape[:-2], strides=self.strides, padding=self.padding)
        layout = channels_last(x.ndim)
        y = jax.lax.conv_general_dilated(x, kernel, window.strides, window.pads, dimension_numbers=layout)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
