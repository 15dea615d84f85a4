"""A network that Aether trained, in PyTorch: what it computes, to be read. Needs this folder, torch and safetensors.

model = load("."); logits = model(tokens)    # (b, t) ids -> (b, t, vocab)
model = load("."); logits = model(images)    # (b, channels, h, w), (pixels/255 - mean)/std -> (b, classes)

Text goes on from a cache: cache = Cache(); model(prompt, cache=cache); model(what_follows, cache=cache). f are the
facts of config.json. Linear maps compute in the dtype of their weights; the residual stream, ⵟ units, scores and norms
in float32 at least.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


def load(folder: str, dtype: str = "float32") -> nn.Module:
    """Return the network of an export, its parameters in `dtype`."""
    facts = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["network"]
    with torch.device("meta"):
        model = network_of(facts)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return model.to(getattr(torch, dtype)).eval()


def network_of(f: dict[str, Any]) -> nn.Module:
    """Return a network with random parameters."""
    return {"gpt": TextModel, "bert": TextModel, "vit": ViT, "resnet": ResNet}[f["family"]](f)


class TextModel(nn.Module):
    """GPT, or BERT, whose positions also see what comes after them."""

    def __init__(self, f: dict[str, Any]):
        super().__init__()
        self.f = f
        self.embed = nn.Embedding(f["vocab"] + (not f["causal"]), f["width"])  # BERT's last id is the mask
        self.position = nn.Embedding(f["context"], f["width"]) if f["position"] == "learned" else None
        self.blocks = nn.ModuleList(Block(f, k) for k in range(f["layers"]))
        self.norm = layer_norm(f)
        self.head = Linear(f["width"], f["vocab"], bias=False) if f["head"] == "untied" else None

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """(b, t) ids -> (b, t, vocab) logits.

        Args:
          tokens: ids.
          mask: (b, s), 0 where there is padding, which is not seen and not counted; s = t, or with a cache its length
            more.
          positions: (b, t); by default counted from 0, or from where the cache ends.
          cache: `Cache`, or one of transformers'; the tokens go on from it, and are added to it. Causal models only.
        """
        return self.logits(self.hidden(tokens, mask, positions, cache))

    def hidden(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """(b, t) ids -> (b, t, width), of which `logits` makes logits."""
        past, t = 0 if cache is None else cache.get_seq_length(), tokens.shape[1]
        index = torch.arange(past + t, device=tokens.device)
        seen = (index <= index[past:, None])[None, None] if self.f["causal"] else None  # (1, 1, t, s)
        if mask is not None:
            of_keys = mask.bool()[:, None, None]
            seen = of_keys if seen is None else seen & of_keys
        if positions is None:
            positions = index[None, past:] if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        x = wide(self.embed(tokens)) * self.f["embed_scale"]
        if self.position is not None:
            x = x + self.position(positions)
        for block in self.blocks:
            x = block(x, positions, seen, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, vocab)."""
        if self.head is not None:
            return wide(self.head(hidden))
        table = self.embed.weight[: self.f["vocab"]]
        return wide(F.linear(hidden.to(table.dtype), table))


class ViT(nn.Module):
    """Patches of an image as a text that is read at once."""

    def __init__(self, f: dict[str, Any]):
        super().__init__()
        self.f = f
        patches, first = (f["image_size"] // f["patch"]) ** 2, f["pool"] == "class"
        self.patches = Linear(f["patch"] ** 2 * f["channels"], f["width"], bias=f["linear_bias"])
        self.token = nn.Embedding(1, f["width"]) if first else None
        self.position = nn.Embedding(patches + first, f["width"]) if f["position"] == "learned" else None
        self.blocks = nn.ModuleList(Block(f, k) for k in range(f["layers"]))
        self.norm = layer_norm(f)
        self.head = head(f, f["width"])

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, s, s) -> (b, classes)."""
        k = self.f["patch"]
        x = images.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # (b, c, rows, k, columns, k)
        x = wide(self.patches(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)))
        if self.token is not None:
            x = torch.cat([wide(self.token.weight).expand(x.shape[0], 1, -1), x], 1)
        if self.position is not None:
            x = x + self.position.weight
        positions = torch.arange(x.shape[1], device=x.device)[None]
        for block in self.blocks:
            x = block(x, positions, None, None)
        x = self.norm(x)
        return wide(self.head(x.mean(1) if self.token is None else x[:, 0]))


class Block(nn.Module):
    """Adds to the stream x (b, t, width) what attention and MLP make of it."""

    def __init__(self, f: dict[str, Any], layer: int):
        super().__init__()
        kind = {"dot": Attention, "yat": YatAttention, "yat_linear": LinearAttention}[f["attention"]]
        self.attention = kind(f, layer)
        self.mlp = MLP(f)
        self.norm1, self.norm2 = layer_norm(f), layer_norm(f)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor | None, cache: Any) -> Tensor:
        """`seen` (b, h, t, s) is True where a query may look; the other two as in `TextModel`."""
        x = x + self.attention(self.norm1(x), positions, seen, cache)
        return x + self.mlp(self.norm2(x))


class MLP(nn.Module):
    """out(hidden(x)), `hidden` a ⵟ unit, or a linear map and GELU by tanh."""

    def __init__(self, f: dict[str, Any]):
        super().__init__()
        self.yat = f["mlp"] == "yat"
        sizes = f["width"], f["hidden"]
        self.hidden = Yat(*sizes, f["spherical"], f["unit_bias"]) if self.yat else Linear(*sizes, bias=f["linear_bias"])
        self.out = Linear(f["hidden"], f["width"], bias=f["linear_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        h = self.hidden(x)
        return self.out(h if self.yat else F.gelu(h, approximate="tanh"))


class Attention(nn.Module):
    """Weighs values by softmax(score(queries, keys)/√k), the score here a dot product."""

    def __init__(self, f: dict[str, Any], layer: int):
        super().__init__()
        self.heads, self.layer = f["heads"], layer
        self.theta = f["rope_theta"] if f["position"] == "rotary" else None
        self.directions = f["spherical"] and f["attention"] != "dot" or f["attention"] == "yat_linear"
        maps = (Linear(f["width"], f["width"], bias=f["linear_bias"]) for _ in range(4))
        self.query, self.key, self.value, self.out = maps

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor | None, cache: Any) -> Tensor:
        """(b, t, width) -> the same."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        q, k = (self.prepared(a, positions).to(v.dtype) for a in (q, k))  # (b, h, t, k), kept as they are compared
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = self.mixed(wide(q), wide(k), wide(v), seen)
        return self.out(y.transpose(1, 2).flatten(2))

    def prepared(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys, and leave their lengths out where directions alone are compared."""
        x = wide(x) if self.theta is None else rotate(wide(x), positions, self.theta)
        return unit(x) if self.directions else x

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """Return the means of v that queries ask for, (b, h, t, k)."""
        score = self.score(q, k) / math.sqrt(q.shape[-1])
        if seen is not None:
            score = score.masked_fill(~seen, torch.finfo(score.dtype).min)  # finite: padding may see nothing at all
        return score.softmax(-1) @ v

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """(b, h, t, k) and (b, h, s, k) -> (b, h, t, s)."""
        return q @ k.transpose(-1, -2)


class Unit(nn.Module):
    """What ⵟ units share: b = softplus(bias), α, ε = softplus(epsilon_param)."""

    def set_numbers(self, numbers: int, biases: int, bias: bool) -> None:
        """Add the parameters."""
        self.alpha = nn.Parameter(torch.ones(numbers))
        self.epsilon_param = nn.Parameter(torch.zeros(numbers))
        self.bias = nn.Parameter(torch.zeros(biases)) if bias else None

    def respond(self, dot: Tensor, squares: Tensor | float, dims: int = 0) -> Tensor:
        """α (x·w + b)² / (‖x - w‖² + ε), of x·w and ‖x‖² + ‖w‖²; units are the axis before the last `dims`."""
        places = (-1,) + (1,) * dims
        alpha, epsilon = self.alpha.view(places), F.softplus(wide(self.epsilon_param)).view(places)
        shifted = dot if self.bias is None else dot + F.softplus(wide(self.bias)).view(places)
        return alpha * shifted**2 / ((squares - 2 * dot).clamp(min=0) + epsilon)


class YatAttention(Attention, Unit):
    """Attention whose score is a ⵟ unit, with b, α and ε one a head."""

    def __init__(self, f: dict[str, Any], layer: int):
        super().__init__(f, layer)
        self.set_numbers(f["heads"], f["heads"], f["unit_bias"])

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """As above."""
        squares = 2.0 if self.directions else (q * q).sum(-1)[..., None] + (k * k).sum(-1)[..., None, :]
        return self.respond(super().score(q, k), squares, 2)


class LinearAttention(Attention):
    """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k), φ of the kernel (s + b)²/(2 + ε - 2s): exact to first order, beyond by anchors."""

    def __init__(self, f: dict[str, Any], layer: int):
        super().__init__(f, layer)
        width = f["width"] // f["heads"]
        self.anchors = nn.Parameter(torch.randn(f["heads"], f["anchors"], width))
        self.register_buffer("whitening", torch.eye(f["anchors"]).repeat(f["heads"], 1, 1))
        b, c = f["kernel_bias"], 2 + f["kernel_epsilon"]
        self.c, self.a0, self.a1 = c, b**2 / c, (2 * b + 2 / c * b**2) / c
        self.a2 = (c + 2 * b) ** 2 / 4 / c * (2 / c) ** 2

    def phi(self, x: Tensor) -> Tensor:
        """(b, h, t, k) -> (b, h, t, m)."""
        s = x @ unit(wide(self.anchors)).transpose(-1, -2)
        rest = self.a2 * s * s / (1 - 2 / self.c * s.clamp(max=1))
        rest = rest @ wide(self.whitening).transpose(-1, -2)
        return torch.cat([torch.full_like(x[..., :1], self.a0**0.5), self.a1**0.5 * x, rest], -1)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """As above; `seen` is (b, 1, 1, s), the same for all queries."""
        q, k = self.phi(q), self.phi(k)
        count: Any = k.shape[2]
        if seen is not None:
            k, count = k * seen.transpose(-1, -2), seen.sum(-1)
        total = (q * k.sum(2, keepdim=True)).sum(-1)
        floor = 0.1 * (self.a0 + self.a2 / v.shape[-1]) * count
        return q @ (k.transpose(-1, -2) @ v) / total.maximum(torch.ones_like(total) * floor)[..., None]


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean over the places, head."""

    def __init__(self, f: dict[str, Any]):
        super().__init__()
        yat, stem, width = f["units"] == "yat", f["stem"], f["width"]
        sizes = f["channels"], width, stem["size"], stem["strides"]
        self.stem = Conv(*sizes) if yat else NormalizedConv(*sizes, f["norm_epsilon"])
        self.pool = nn.MaxPool2d(3, 2, 1) if stem["pool"] else nn.Identity()
        stages = []
        for s, count in enumerate(f["stages"]):
            features, units = f["width"] * 2**s, f["hidden"] * 2**s
            out = 4 * features if f["bottleneck"] else features
            inputs = [width] + [out] * (count - 1)
            block = YatBlock if yat else ReLUBlock
            stages.append(
                nn.ModuleList(block(f, n, features, units, out, 2 if s and not k else 1) for k, n in enumerate(inputs))
            )
            width = out
        self.stages = nn.ModuleList(stages)
        self.head = head(f, width)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, classes)."""
        x = wide(self.pool(self.stem(images)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return wide(self.head(x.mean((2, 3))))


class YatBlock(nn.Module):
    """skip(x) + out(yat(reduce(x))); `reduce`, `skip` only where the block has them; kernels of `out` have zero sum."""

    def __init__(self, f: dict[str, Any], width: int, features: int, units: int, out: int, strides: int):
        super().__init__()
        deep = f["bottleneck"]
        self.reduce = Conv(width, features, 1, bias=False) if deep else nn.Identity()
        self.hidden = YatConv(features if deep else width, units, 3, strides, f["spherical"], f["unit_bias"])
        self.out = Conv(units, out, 1 if deep else 3, zero_sum=True)
        changes = strides > 1 or width != out
        self.skip = Conv(width, out, 1, strides, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (b, c, h, w) to the next one."""
        return self.skip(x) + wide(self.out(self.hidden(self.reduce(x))))


class ReLUBlock(nn.Module):
    """relu(skip(x) + out(hidden(reduce(x)))), all convolutions with BatchNorm."""

    def __init__(self, f: dict[str, Any], width: int, features: int, units: int, out: int, strides: int):
        super().__init__()
        deep, e = f["bottleneck"], f["norm_epsilon"]
        self.reduce = NormalizedConv(width, features, 1, 1, e) if deep else nn.Identity()
        self.hidden = NormalizedConv(features if deep else width, units, 3, strides, e)
        self.out = NormalizedConv(units, out, 1 if deep else 3, 1, e, relu=False)
        changes = strides > 1 or width != out
        self.skip = NormalizedConv(width, out, 1, strides, e, relu=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (b, c, h, w) to the next one."""
        return F.relu(self.skip(x) + self.out(self.hidden(self.reduce(x))))


class NormalizedConv(nn.Module):
    """BatchNorm of a convolution."""

    def __init__(self, inputs: int, outputs: int, size: int, strides: int, epsilon: float, relu: bool = True):
        super().__init__()
        self.conv = Conv(inputs, outputs, size, strides, bias=False)
        self.norm = BatchNorm(outputs, epsilon)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h', w')."""
        y = self.norm(self.conv(x))
        return F.relu(y) if self.relu else y


class BatchNorm(nn.Module):
    """By the running statistics, or in training by those of the batch."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same."""
        mean, var, scale, bias = (wide(a) for a in (self.running_mean, self.running_var, self.weight, self.bias))
        return F.batch_norm(wide(x), mean, var, scale, bias, self.training, 0.1, self.epsilon)


class Conv(nn.Conv2d):
    """A convolution with size // 2 zeros on every side, in the dtype of its kernels."""

    def __init__(
        self, inputs: int, outputs: int, size: int, strides: int = 1, bias: bool = True, zero_sum: bool = False
    ):
        super().__init__(inputs, outputs, size, strides, size // 2, bias=bias)
        self.zero_sum = zero_sum

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h', w')."""
        w = self.weight
        if self.zero_sum:
            w = (wide(w) - wide(w).mean((1, 2, 3), keepdim=True)).to(w.dtype)
        return F.conv2d(x.to(w.dtype), w, self.bias, self.stride, self.padding)


class YatConv(Unit):
    """The ⵟ unit of every patch; the zeros around the image are entries of patches."""

    def __init__(self, inputs: int, outputs: int, size: int, strides: int, spherical: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size) / 4)
        self.set_numbers(1, outputs, bias)
        self.strides, self.spherical = strides, spherical

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h', w')."""
        x, w = wide(x), wide(self.weight)
        how = dict(stride=self.strides, padding=w.shape[-1] // 2)
        dot, ww = F.conv2d(x, w, **how), (w * w).sum((1, 2, 3))[:, None, None]
        xx = F.conv2d((x * x).sum(1, keepdim=True), torch.ones_like(w[:1, :1]), **how)
        if self.spherical:
            return self.respond(dot / (length(xx) * length(ww)), 2.0, 2)
        return self.respond(dot, xx + ww, 2)


class Yat(Unit):
    """The ⵟ unit of the last axis, of unit vectors if `spherical`."""

    def __init__(self, inputs: int, outputs: int, spherical: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.set_numbers(1, outputs, bias)
        self.spherical = spherical

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        x, w = wide(x), wide(self.weight)
        if self.spherical:
            return self.respond(unit(x) @ unit(w).T, 2.0)
        return self.respond(x @ w.T, (x * x).sum(-1, keepdim=True) + (w * w).sum(-1))


class Linear(nn.Linear):
    """x·Wᵀ + b, in the dtype of W."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """In float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        bias = None if self.bias is None else wide(self.bias)
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), bias, self.eps)


def layer_norm(f: dict[str, Any]) -> nn.Module:
    """Return LayerNorm where there is one."""
    if f["norm"] == "none":
        return nn.Identity()
    return LayerNorm(f["width"], f["norm_epsilon"], bias=f["linear_bias"])


def head(f: dict[str, Any], width: int) -> nn.Module:
    """Return a linear map to the classes, or one prototype a class."""
    if f["head"] == "yat":
        return Yat(width, f["classes"], f["spherical"], f["unit_bias"])
    return Linear(width, f["classes"], bias=f["linear_bias"])


class Cache:
    """Keys and values (b, h, s, k) of the positions before, for each layer; transformers' caches do as well."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        """Return how many positions there are."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add a layer's next positions; return all of them."""
        if layer == len(self.layers):
            self.layers.append((keys[:, :, :0], values[:, :, :0]))
        before = self.layers[layer]
        self.layers[layer] = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        return self.layers[layer]


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of x (b, h, t, k) by position · theta^(-2i/k)."""
    k = x.shape[-1]
    rates = theta ** (-torch.arange(0, k, 2, device=x.device, dtype=x.dtype) / k)
    angle = positions[:, None, :, None] * rates
    sin, cos = angle.sin(), angle.cos()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def unit(x: Tensor) -> Tensor:
    """x/‖x‖ along the last axis; 0 stays 0."""
    return x / length((x * x).sum(-1, keepdim=True))


def length(squares: Tensor) -> Tensor:
    """The root, or 1 of nothing."""
    return torch.where(squares > 0, squares, 1).sqrt()


def wide(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
