"""AetherGPT and the GPT-2 baseline: one family, each part turned from one to the other by a field of `ModelConfig`.

Axes: b batch, t position, d width, n layers.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.config import ModelConfig
from aether.models.text import TextModel
from aether.nn import KVCache


class GPT(TextModel):
    """A decoder-only language model; see `TextModel`.

    Args:
      c: the resolved configuration.
      context: length of the table of learned positions.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, context: int, rngs: nnx.Rngs):
        super().__init__(c, context, c.vocab, causal=True, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        *,
        segments: Array | None = None,
        positions: Array | None = None,
        cache: KVCache | None = None,
        key: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Run the network up to the head.

        Args:
          tokens: (b, t) ids.
          segments: (b, t); attention stays inside equal numbers. None: one document.
          positions: (b, t); None: counted from 0, or from the cache's length.
          cache: of `init_cache`, to continue from; excludes `segments`.
          key: of dropout; None: no dropout.

        Returns:
          (b, t, d) hidden states in the compute dtype, to be multiplied by `head_kernel`, and the new cache.
        """
        return self.hidden(tokens, segments, positions, cache, key)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Return an empty cache of `length` positions for every layer, leaves with a leading layers axis."""
        c = self.config
        shape = (c.layers, batch, length, c.heads, c.width // c.heads)
        zeros = jnp.zeros(shape, c.dtype)
        return KVCache(zeros, zeros, jnp.zeros((c.layers,), jnp.int32))
