"""Whole networks, each made by (ModelConfig, context, rngs)."""

from aether.models.gpt import GPT

MODELS = {"aether": GPT, "gpt2": GPT}
