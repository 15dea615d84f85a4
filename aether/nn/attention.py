"""Multi-head self-attention, its score a dot product or a ⵟ-product, with a key/value cache."""

from typing import NamedTuple

import jax
from flax import nnx
from jax import Array

from aether.kernels.attention import dot_scores, weighted_values, yat_scores
from aether.kernels.rope import rotate
from aether.kernels.yat import unit
from aether.nn.linear import Linear
from aether.nn.yat import YatUnit


class KVCache(NamedTuple):
    """Keys as they are scored (rotated, normalised) and values of the positions before `length`, (b, s, h, k) each."""

    key: Array
    value: Array
    length: Array


class Attention(nnx.Module):
    """out(softmax(q·k/√d) v), with q, k, v and out linear maps.

    Args:
      features: width of the residual stream.
      num_heads: heads; must divide `features`.
      rope_theta: base of the rotary wavelengths; None for no rotation.
      std: standard deviation of the initial q, k and v kernels.
      out_std: of the output kernel.
      use_bias: biases in the four linear maps.
      dtype: compute dtype; scores and softmax are float32.
      rngs: source of the initial kernels.

    Raises:
      ValueError: `num_heads` does not divide `features`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        rope_theta: float | None = None,
        std: float,
        out_std: float,
        use_bias: bool = True,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(
                f"features is {features} and num_heads {num_heads}; features must be a multiple of num_heads."
            )

        def linear(std: float, axes: tuple[str, str]) -> Linear:
            return Linear(features, features, std=std, use_bias=use_bias, axes=axes, dtype=dtype, rngs=rngs)

        self.query = linear(std, ("embed", "heads"))
        self.key = linear(std, ("embed", "heads"))
        self.value = linear(std, ("embed", "heads"))
        self.out = linear(out_std, ("heads", "embed"))
        self.num_heads = num_heads
        self.rope_theta = rope_theta

    def prepare(self, x: Array) -> Array:
        """Return queries or keys (b, t, h, k) as `scores` takes them; keys are cached like that."""
        return x

    def scores(self, q: Array, k: Array) -> Array:
        """Return float32 scores (b, h, t, s) of prepared queries (b, t, h, k) and keys (b, s, h, k)."""
        return dot_scores(q, k)

    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        """Attend.

        Args:
          x: (b, t, d).
          positions: (b, t), for the rotation.
          mask: booleans broadcastable to (b, h, t, s); s is the cache's length where there is one, else t.
          cache: the keys and values before x; x's own are written behind them.

        Returns:
          (b, t, d), and the cache with x in it.
        """
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, self.num_heads, -1) for f in (self.query, self.key, self.value))
        if self.rope_theta is not None:
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        q, k = self.prepare(q), self.prepare(k)
        if cache is not None:
            at = (0, cache.length, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at)
            v = jax.lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at)
            cache = KVCache(k, v, cache.length + t)
        y = weighted_values(self.scores(q, k), v, mask)
        return self.out(y.reshape(b, t, -1)), cache


class YatAttention(YatUnit, Attention):
    """Attention whose score is s = α (q·k + b)² / ((‖q − k‖² + ε) √d), with b, α and ε learned per head.

    Args:
      features: width of the residual stream.
      num_heads: heads; must divide `features`.
      use_bias: biases in the four linear maps.
      use_score_bias: have a b; it is softplus(bias).
      bias_init: initial b.
      alpha_init: initial α.
      epsilon: initial ε.
      spherical: compare the directions of q and k only.
      rngs: source of the initial parameters.
      **kwargs: those of `Attention`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        use_bias: bool = True,
        use_score_bias: bool = True,
        bias_init: float = 0.1,
        alpha_init: float = 1.0,
        epsilon: float = 1e-5,
        spherical: bool = False,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(features, num_heads, use_bias=use_bias, rngs=rngs, **kwargs)
        heads = (num_heads,)
        self.init_unit(
            heads,
            heads,
            ("heads",),
            use_bias=use_score_bias,
            softplus_bias=use_score_bias,
            learnable_epsilon=True,
            rngs=rngs,
            bias_init=bias_init,
            alpha_init=alpha_init,
            epsilon=epsilon,
        )
        self.spherical = spherical

    def prepare(self, x: Array) -> Array:
        """Return unit vectors if the score is of directions alone."""
        return unit(x) if self.spherical else x

    def scores(self, q: Array, k: Array) -> Array:
        """Return float32 ⵟ scores (b, h, t, s) of prepared queries (b, t, h, k) and keys (b, s, h, k)."""
        return yat_scores(q, k, spherical=self.spherical, normalized=True, **self.unit())
