"""Normalisation by the statistics of a batch: what the ResNet baseline has and Aether does without."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.nn.param import check_sizes, compute_dtype, constant


class BatchNorm(nnx.Module):
    """(x − mean) / √(variance + epsilon) · scale + bias, by channel, in float32 (Ioffe and Szegedy, 2015).

    In training, mean and variance (divided by n, not n − 1) are those of the batch over all axes but the last; under a
    mesh that is the global batch, the sums being over all devices. The running ones, `mean` and `var`, follow as
    momentum · running + (1 − momentum) · batch, and take the batch's place outside training.

    Args:
      features: channels of x.
      momentum: of the running statistics; 0.9 is PyTorch's 0.1, and forgets in some tens of steps.
      epsilon: added to the variance.
      scale_init: initial scale; 0 in the last norm of a residual branch makes the block start as its skip
        (Goyal et al., 2017).
      axis: logical name of the channels.
      dtype: of the result.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        scale_init: float = 1.0,
        axis: str | None = "mlp",
        dtype: str = "float32",
    ):
        check_sizes(features=features)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum is {momentum}; it must be in [0, 1).")
        self.scale = constant((features,), scale_init, (axis,))
        self.bias = constant((features,), 0.0, (axis,))
        self.mean = nnx.BatchStat(jnp.zeros((features,)), axes=(axis,))
        self.var = nnx.BatchStat(jnp.ones((features,)), axes=(axis,))
        self.momentum, self.epsilon, self.dtype = momentum, epsilon, compute_dtype(dtype)

    def __call__(self, x: Array, train: bool) -> Array:
        """Normalise (..., features); `train` by the batch's statistics, which move the running ones."""
        x = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train:
            mean, var = self._moments(x)
            for running, of_batch in ((self.mean, mean), (self.var, var)):
                running[...] = self.momentum * running[...] + (1.0 - self.momentum) * jax.lax.stop_gradient(of_batch)
        y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)

    def _moments(self, x: Array) -> tuple[Array, Array]:
        """Return mean and variance in one pass over x; about the running mean, near which nothing cancels."""
        axes, near = tuple(range(x.ndim - 1)), self.mean[...]
        off = x - near
        first, second = jnp.mean(off, axes), jnp.mean(off * off, axes)
        return near + first, jnp.maximum(second - first * first, 0.0)
