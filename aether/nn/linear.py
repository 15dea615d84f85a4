"""The linear parts: dense maps, embedding tables, layer normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.nn.param import check_sizes, compute_dtype, constant, normal


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
