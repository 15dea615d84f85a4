"""MiniBERT and the BERT baseline: encoders that fill in what is masked, each part turned by a field of `ModelConfig`.

Axes: b batch, t position, d width.
"""

from flax import nnx
from jax import Array

from aether.config import ModelConfig
from aether.models.text import TextModel


class Bert(TextModel):
    """A bidirectional encoder; see `TextModel`.

    The mask is the first id that the tokenizer does not have, `c.vocab` by default: read and never predicted. Against
    BERT (Devlin et al., 2019) norms stand before the branches, there is no second sentence, and hidden states go to the
    head as they are.

    Args:
      c: the resolved configuration.
      context: length of the table of learned positions.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, context: int, rngs: nnx.Rngs):
        super().__init__(c, context, c.vocab + 1, causal=False, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        *,
        segments: Array | None = None,
        positions: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Run the network up to the head.

        Args:
          tokens: (b, t) ids, `c.vocab` where masked.
          segments: (b, t); attention stays inside equal numbers, each a run of positions. None: one document.
          positions: (b, t); None: counted from 0.
          key: of dropout; None: no dropout.

        Returns:
          (b, t, d) hidden states in the compute dtype, to be multiplied by `head_kernel`.
        """
        return self.hidden(tokens, segments, positions, None, key)[0]
