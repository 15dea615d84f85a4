"""Whole networks: of text made by (ModelConfig, context, rngs), `ViT` by (ModelConfig, image size, channels, rngs)."""

from aether.models.bert import Bert
from aether.models.gpt import GPT
from aether.models.vit import ViT

MODELS = {"aether": GPT, "gpt2": GPT, "minibert": Bert, "bert": Bert}

__all__ = ["GPT", "MODELS", "Bert", "ViT"]
