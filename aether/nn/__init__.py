"""Layers: NNX modules with plain arguments, no config and no mesh."""

from aether.kernels.squash import soft_tanh, softer_sigmoid, softermax
from aether.nn.attention import Attention, KVCache, YatAttention
from aether.nn.conv import (
    YatConv,
    YatConv1D,
    YatConv2D,
    YatConv3D,
    YatConvTranspose,
    YatConvTranspose1D,
    YatConvTranspose2D,
    YatConvTranspose3D,
)
from aether.nn.embed import YatEmbed
from aether.nn.linear import Conv, Embed, LayerNorm, Linear
from aether.nn.linear_attention import YatLinearAttention
from aether.nn.mlp import YatMLP
from aether.nn.norm import BatchNorm
from aether.nn.param import FrozenParam
from aether.nn.prototypes import KernelBank, draw_prototypes
from aether.nn.rnn import YatGRUCell, YatLSTMCell, YatSimpleCell
from aether.nn.yat import YatNMN

__all__ = [
    "Attention",
    "BatchNorm",
    "Conv",
    "Embed",
    "FrozenParam",
    "KVCache",
    "KernelBank",
    "LayerNorm",
    "Linear",
    "YatAttention",
    "YatConv",
    "YatConv1D",
    "YatConv2D",
    "YatConv3D",
    "YatConvTranspose",
    "YatConvTranspose1D",
    "YatConvTranspose2D",
    "YatConvTranspose3D",
    "YatEmbed",
    "YatGRUCell",
    "YatLSTMCell",
    "YatLinearAttention",
    "YatMLP",
    "YatNMN",
    "YatSimpleCell",
    "draw_prototypes",
    "soft_tanh",
    "softer_sigmoid",
    "softermax",
]
