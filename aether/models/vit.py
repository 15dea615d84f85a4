"""Aether-ViT and the ViT baseline: image classifiers, each part turned by a field of `ModelConfig`.

Axes: b batch, t patch (before them the class token, if any), d width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.config import ModelConfig
from aether.models.block import final_std, layer_norm, stacked, through, unit_options
from aether.nn import Embed, Linear, YatNMN
from aether.parallel import activation


class ViT(nnx.Module):
    """Patches as tokens, scanned blocks, a head on the class token or on the mean (Dosovitskiy et al., 2021).

    The patches' kernel starts at 1/√fan_in, so that the tokens of normalised images have entries of O(1) whatever the
    patch. The head is in float32: a linear map, or one ⵟ prototype a class, whose responses are the logits. These are
    not negative, and α = `model.mlp_alpha` makes them at most α (1 + b)²/ε, 64 and more at the defaults.

    Args:
      c: the resolved configuration.
      image_size: pixels a side, a multiple of `c.patch`.
      channels: of the images.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, image_size: int, channels: int, rngs: nnx.Rngs):
        if image_size % c.patch:
            raise ValueError(f"image_size is {image_size} and model.patch {c.patch}; the first must be a multiple.")
        self.config, self.shape = c, (image_size, image_size, channels)
        biased, axes = c.linear_bias == "yes", ("position", "embed")
        self.patches = Linear(
            c.patch**2 * channels, c.width, use_bias=biased, axes=(None, "embed"), dtype=c.dtype, rngs=rngs
        )
        pooled = c.pool == "mean"
        self.token = None if pooled else Embed(1, c.width, std=c.embed_std, axes=axes, rngs=rngs)
        count = (image_size // c.patch) ** 2 + (not pooled)
        learned = c.position == "learned"
        self.position = Embed(count, c.width, std=c.embed_std, axes=axes, rngs=rngs) if learned else None
        self.blocks = stacked(c, False, rngs)
        self.norm = layer_norm(c)
        self.head = _head(c, rngs)

    def __call__(self, images: Array, key: Array | None = None) -> Array:
        """Classify.

        Args:
          images: (b, s, s, channels), floating, normalised.
          key: of dropout; None: no dropout.

        Returns:
          (b, classes) float32 logits.

        Raises:
          ValueError: the images are not of the size that the network was made for.
        """
        c = self.config
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"images are {images.shape}; this network was made for (b, {', '.join(map(str, self.shape))})."
            )
        with jax.named_scope("embed"):
            x = self.patches(cut(images, c.patch)).astype(jnp.float32)
            if self.token is not None:
                x = jnp.concatenate([jnp.broadcast_to(self.token.embedding[...], (x.shape[0], 1, c.width)), x], 1)
            if self.position is not None:
                x = x + self.position.embedding[...]
        x, _ = through(self.blocks, c, activation(x), key=key)
        with jax.named_scope("head"):
            x = (x if self.norm is None else self.norm(x)).astype(jnp.float32)
            return self.head(x[:, 0] if c.pool == "class" else jnp.mean(x, 1))


def cut(images: Array, patch: int) -> Array:
    """Cut (b, s, s, c) into patches, row by row, each flattened with its channels last: (b, (s/patch)², patch²·c)."""
    b, size, _, channels = images.shape
    side = size // patch
    pieces = images.reshape(b, side, patch, side, patch, channels).swapaxes(2, 3)
    return pieces.reshape(b, side * side, patch * patch * channels)


def _head(c: ModelConfig, rngs: nnx.Rngs) -> Linear | YatNMN:
    axes = ("embed", None)
    if c.head == "linear":
        return Linear(c.width, c.classes, std=final_std(c), use_bias=c.linear_bias == "yes", axes=axes, rngs=rngs)
    unit = dict(use_bias=c.yat_bias > 0, **unit_options(c, c.mlp_alpha))
    return YatNMN(c.width, c.classes, axes=axes, rngs=rngs, **unit)
