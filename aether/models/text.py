"""What GPT and BERT share: the table of ids, positions, stacked blocks, and the matrix that makes logits.

Axes: b batch, t position, d width, v vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.config import ModelConfig
from aether.models.block import USUAL_STD, final_std, layer_norm, stacked, through
from aether.nn import Embed, KVCache, Linear
from aether.nn.param import pad_axis
from aether.parallel import looked_up


class TextModel(nnx.Module):
    """Embedding, scanned blocks, linear head.

    The residual stream is float32; what the branches compute is in `model.dtype`. With a tied head the table E starts
    as small as GPT-2's, so that the logits x·Eᵀ do, and what is read of it is scaled to `c.embed_std`. (With a table
    of that size and its products scaled down, steps of Adam's size hardly move the logits: LOG.md.)

    Args:
      c: the resolved configuration.
      context: length of the table of learned positions.
      inputs: ids that may be read; the first `c.vocab` of them may be predicted.
      causal: whether a position sees only itself and those before it.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, context: int, inputs: int, causal: bool, rngs: nnx.Rngs):
        self.config = c
        self.vocab = c.vocab
        tied = c.head == "tied"
        std = USUAL_STD if tied else c.embed_std
        self.embed, self.gain = Embed(inputs, c.width, std=std, rngs=rngs), c.embed_std / std
        pad_axis(self.embed.embedding, 0, c.rows)
        learned = c.position == "learned"
        axes = ("position", "embed")
        self.position = Embed(context, c.width, std=c.embed_std, axes=axes, rngs=rngs) if learned else None
        self.blocks = stacked(c, causal, rngs)
        self.norm = layer_norm(c)
        axes = ("embed", "vocab")
        self.head = None if tied else Linear(c.width, c.vocab, std=final_std(c), use_bias=False, axes=axes, rngs=rngs)
        if self.head is not None:
            pad_axis(self.head.kernel, 1, c.rows)

    def hidden(
        self,
        tokens: Array,
        segments: Array | None,
        positions: Array | None,
        cache: KVCache | None,
        key: Array | None,
    ) -> tuple[Array, KVCache | None]:
        """Run the network up to the head; see `GPT.__call__`."""
        c = self.config
        b, t = tokens.shape
        start = 0 if cache is None else cache.length[0]
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(t), (b, t))
        with jax.named_scope("embed"):
            x = self.gain * looked_up(self.embed, tokens)
            if self.position is not None:
                x = x + looked_up(self.position, positions)
        x, cache = through(self.blocks, c, x, positions=positions, segments=segments, cache=cache, key=key)
        with jax.named_scope("head"):
            return (self.norm(x) if self.norm is not None else x).astype(c.dtype), cache

    def head_kernel(self) -> Array:
        """Return the (d, rows) matrix that turns hidden states into logits, float32.

        Its columns from `vocab` on pad it to sizes that divide well; no id that may be predicted has them.
        """
        if self.head is not None:
            return self.head.kernel[...]
        return self.embed.embedding[...].T

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits (b, t, v) of hidden states (b, t, d)."""
        kernel = self.head_kernel()[:, : self.vocab].astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
