"""Layers: NNX modules with plain arguments, no config and no mesh."""

from aether.nn.attention import Attention, KVCache, YatAttention
from aether.nn.linear import Embed, LayerNorm, Linear
from aether.nn.prototypes import KernelBank, draw_prototypes
from aether.nn.yat import YatNMN

__all__ = [
    "Attention",
    "Embed",
    "KVCache",
    "KernelBank",
    "LayerNorm",
    "Linear",
    "YatAttention",
    "YatNMN",
    "draw_prototypes",
]
