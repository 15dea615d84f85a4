"""A network that Aether trained, in Flax linen: what it computes, to be read. Needs this folder, flax and numpy.

module, variables = load("."); logits = module.apply(variables, tokens)    # (b, t) ids -> (b, t, vocab)
module, variables = load("."); logits = module.apply(variables, images)    # (b, h, w, channels) -> (b, classes)

Images are (pixels/255 - mean)/std. What is "blocks.3.mlp.out.kernel" in parameters.npz is variables["params"]
["blocks_3"]["mlp"]["out"]["kernel"] here, and "stages.0.1.out.bias" is ["stages_0_1"]["out"]["bias"]; the statistics of
BatchNorm are in "batch_stats", what belongs to the anchors of linear attention in "constants". `f` has the facts of
config.json and what the parameters show: `linear_bias`, `unit_bias` (of linear maps, of ⵟ units) and `anchors` a head.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
COLLECTIONS = {"mean": "batch_stats", "var": "batch_stats", "whitening": "constants"}
init = nn.initializers


def load(folder: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of an export and its variables, float32."""
    f = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["network"]
    with np.load(Path(folder) / "parameters.npz", allow_pickle=False) as file:
        p = {name: _wide(file[name]) for name in file.files}
    biased = {name.removesuffix(".bias") for name in p if name.endswith(".bias")}
    units = {name.removesuffix(".epsilon_param") for name in p if name.endswith(".epsilon_param")}
    f |= dict(linear_bias=bool(biased - units), unit_bias=bool(biased & units))
    f["anchors"] = next((a.shape[1] for name, a in p.items() if name.endswith(".anchors")), 0)
    variables: dict[str, Any] = {}
    for name, value in p.items():
        *path, leaf = re.sub(r"\.(?=\d)", "_", name).split(".")
        at = variables.setdefault(COLLECTIONS.get(leaf, "params"), {})
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = value
    return {"gpt": Text, "bert": Text, "vit": ViT, "resnet": ResNet}[f["family"]](f), variables


def _wide(a: np.ndarray) -> np.ndarray:
    """bfloat16, for which npz has no name, is written as the upper halves of float32 numbers."""
    return (a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a


class Text(nn.Module):
    """(b, t) ids -> (b, t, vocab)."""

    f: Mapping[str, Any]

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Return logits."""
        f = self.f
        embed = nn.Embed(f["vocab"] + (not f["causal"]), f["width"], name="embed")
        x = embed(tokens) * f["embed_scale"]
        if f["position"] == "learned":
            x = x + nn.Embed(f["context"], f["width"], name="position")(jnp.arange(tokens.shape[1]))
        x = transformer(f, x)
        if f["head"] == "untied":
            return nn.Dense(f["vocab"], use_bias=False, name="head")(x)
        return x @ embed.embedding[: f["vocab"]].T


class ViT(nn.Module):
    """(b, s, s, c) -> (b, classes)."""

    f: Mapping[str, Any]

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return logits."""
        f, (b, size, _, c) = self.f, images.shape
        k, side = f["patch"], size // f["patch"]
        patches = images.reshape(b, side, k, side, k, c).swapaxes(2, 3).reshape(b, side * side, k * k * c)
        x = nn.Dense(f["width"], use_bias=f["linear_bias"], name="patches")(patches)
        if f["pool"] == "class":
            token = nn.Embed(1, f["width"], name="token")(jnp.zeros((b, 1), int))
            x = jnp.concatenate([token, x], 1)
        if f["position"] == "learned":
            x = x + nn.Embed(x.shape[1], f["width"], name="position")(jnp.arange(x.shape[1]))
        x = transformer(f, x)
        return head(f, x[:, 0] if f["pool"] == "class" else x.mean(1))


def transformer(f: Mapping[str, Any], x: Array) -> Array:
    """Run the stream x (b, t, width) through the blocks and the last norm; within a module's call."""
    for k in range(f["layers"]):
        x = Block(f, name=f"blocks_{k}")(x)
    return norm(f, "norm")(x) if f["norm"] == "layernorm" else x


def norm(f: Mapping[str, Any], name: str) -> nn.LayerNorm:
    """Make a LayerNorm."""
    return nn.LayerNorm(f["norm_epsilon"], use_bias=f["linear_bias"], use_fast_variance=False, name=name)


class Block(nn.Module):
    """Add to the stream x (b, t, width) what attention and MLP make of it."""

    f: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map the stream to itself."""
        f, normed = self.f, self.f["norm"] == "layernorm"
        x = x + Attention(f, name="attention")(norm(f, "norm1")(x) if normed else x)
        return x + MLP(f, name="mlp")(norm(f, "norm2")(x) if normed else x)


class MLP(nn.Module):
    """out(hidden(x)), `hidden` of ⵟ units or linear with GELU."""

    f: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (b, t, width) to itself."""
        f = self.f
        if f["mlp"] == "yat":
            h = Yat(f["hidden"], f["spherical"], f["unit_bias"], name="hidden")(x)
        else:
            h = nn.gelu(nn.Dense(f["hidden"], use_bias=f["linear_bias"], name="hidden")(x), approximate=True)
        return nn.Dense(f["width"], use_bias=f["linear_bias"], name="out")(h)


class Attention(nn.Module):
    """Weigh values by a score of queries and keys; heads are the last but one axis of (b, t, h, k)."""

    f: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (b, t, width) to itself."""
        f, (b, t, width) = self.f, x.shape
        linear = [nn.Dense(width, use_bias=f["linear_bias"], name=n) for n in ("query", "key", "value", "out")]
        q, k, v = (part(x).reshape(b, t, f["heads"], -1) for part in linear[:3])
        if f["position"] == "rotary":
            q, k = rotate(q, f["rope_theta"]), rotate(k, f["rope_theta"])
        if f["attention"] == "yat_linear":
            return linear[3](self.by_features(unit(q), unit(k), v).reshape(b, t, width))
        score = self.score(q, k) / q.shape[-1] ** 0.5
        if f.get("causal"):
            score = jnp.where(np.tri(t, dtype=bool), score, -jnp.inf)
        y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(score), v)
        return linear[3](y.reshape(b, t, width))

    def score(self, q: Array, k: Array) -> Array:
        """Return (b, h, t, s): a product, or α (q·k + b)² / (‖q - k‖² + ε)."""
        f = self.f
        if f["attention"] == "dot":
            return product("bthk,bshk->bhts", q, k)
        q, k = (unit(q), unit(k)) if f["spherical"] else (q, k)
        dot, q_square, k_square = product("bthk,bshk->bhts", q, k), square(q), square(k)
        total = 2.0 if f["spherical"] else jnp.moveaxis(q_square, 1, 2) + k_square.transpose(0, 2, 3, 1)
        bias, alpha, epsilon = (n[..., None, None] for n in numbers(self, f["heads"], f["heads"], f["unit_bias"]))
        return respond(dot, total, bias, alpha, epsilon)

    def by_features(self, q: Array, k: Array, v: Array) -> Array:
        """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k), φ of (s + b)²/(2 + ε - 2s): exact to first order, beyond by anchors."""
        f, h, width, count = self.f, *q.shape[2:], self.f["anchors"]
        anchors = self.param("anchors", init.normal(width**-0.5), (h, count, width))
        whitening = self.variable("constants", "whitening", jnp.zeros, (h, count, count)).value
        anchors, b, c = unit(anchors), f["kernel_bias"], 2 + f["kernel_epsilon"]
        a0, a1, a2 = b**2 / c, (2 * b + 2 / c * b**2) / c, (c + 2 * b) ** 2 / 4 / c * (2 / c) ** 2

        def phi(x: Array) -> Array:
            s = product("bthk,hnk->bthn", x, anchors)
            rest = product("bthn,hmn->bthm", a2 * s * s / (1 - 2 / c * jnp.minimum(s, 1)), whitening)
            return jnp.concatenate([jnp.full((*x.shape[:-1], 1), a0**0.5), a1**0.5 * x, rest], -1)

        q, k = phi(q), phi(k)
        sums = product("bthm,bhmk->bthk", q, product("bshm,bshk->bhmk", k, v))
        total = product("bthm,bhm->bth", q, k.sum(1))
        return sums / jnp.maximum(total, 0.1 * (a0 + a2 / width) * v.shape[1])[..., None]


def rotate(x: Array, theta: float) -> Array:
    """Turn the pairs (2i, 2i + 1) of x (b, t, h, k) by position · theta^(-2i/k)."""
    t, k = x.shape[1], x.shape[-1]
    angle = jnp.arange(t)[:, None] * theta ** (-jnp.arange(0, k, 2) / k)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


class ResNet(nn.Module):
    """(b, h, w, c) -> (b, classes)."""

    f: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return logits."""
        f, stem = self.f, self.f["stem"]
        yat = f["units"] == "yat"
        first = conv(f["width"], stem["size"], stem["strides"], True, "stem") if yat else None
        x = first(x) if first else NormalizedConv(f, f["width"], stem["size"], stem["strides"], name="stem")(x)
        if stem["pool"]:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for s, blocks in enumerate(f["stages"]):
            for k in range(blocks):
                strides = 2 if s and not k else 1
                sizes = f["width"] * 2**s, f["hidden"] * 2**s
                x = (YatBlock if yat else ReluBlock)(f, *sizes, strides, name=f"stages_{s}_{k}")(x)
        return head(f, x.mean((1, 2)))


class YatBlock(nn.Module):
    """skip(x) + out(ⵟ(reduce(x))); `reduce` with bottlenecks only, `skip` where the shape changes."""

    f: Mapping[str, Any]
    features: int
    units: int
    strides: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map the stream (b, h, w, c) to the next one."""
        f, deep = self.f, self.f["bottleneck"]
        out = self.features * (4 if deep else 1)
        h = conv(self.features, 1, 1, False, "reduce")(x) if deep else x
        h = YatConv(self.units, self.strides, f["spherical"], f["unit_bias"], name="hidden")(h)
        if self.strides > 1 or x.shape[-1] != out:
            x = conv(out, 1, self.strides, False, "skip")(x)
        return x + ZeroSumConv(out, 1 if deep else 3, name="out")(h)


class ReluBlock(nn.Module):
    """relu(skip(x) + out(hidden(reduce(x)))), all convolutions with BatchNorm."""

    f: Mapping[str, Any]
    features: int
    units: int
    strides: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map the stream (b, h, w, c) to the next one."""
        f, deep = self.f, self.f["bottleneck"]
        out = self.features * (4 if deep else 1)
        h = NormalizedConv(f, self.features, 1, name="reduce")(x) if deep else x
        h = NormalizedConv(f, self.units, 3, self.strides, name="hidden")(h)
        if self.strides > 1 or x.shape[-1] != out:
            x = NormalizedConv(f, out, 1, self.strides, relu=False, name="skip")(x)
        return nn.relu(x + NormalizedConv(f, out, 1 if deep else 3, relu=False, name="out")(h))


class NormalizedConv(nn.Module):
    """BatchNorm of a convolution, by the running statistics."""

    f: Mapping[str, Any]
    features: int
    size: int
    strides: int = 1
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (b, h, w, c) to (b, h', w', features)."""
        x = conv(self.features, self.size, self.strides, False, "conv")(x)
        x = nn.BatchNorm(True, epsilon=self.f["norm_epsilon"], name="norm")(x)
        return nn.relu(x) if self.relu else x


def conv(features: int, size: int, strides: int, use_bias: bool, name: str) -> nn.Conv:
    """Make a convolution with size // 2 zeros on every side."""
    return nn.Conv(features, (size, size), strides, _zeros(size), use_bias=use_bias, name=name)


class ZeroSumConv(nn.Module):
    """A convolution by kernels less their means."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (b, h, w, c) to (b, h, w, features)."""
        kernel = self.param("kernel", init.lecun_normal(), (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", init.zeros, (self.features,))
        return _patches_times(x, kernel - kernel.mean((0, 1, 2)), 1) + bias


class YatConv(nn.Module):
    """The ⵟ unit of every 3x3 patch; the zeros around the image are entries of patches."""

    features: int
    strides: int
    spherical: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (b, h, w, c) to (b, h', w', features)."""
        kernel = self.param("kernel", init.lecun_normal(), (3, 3, x.shape[-1], self.features))
        dot = _patches_times(x, kernel, self.strides)
        patch = _patches_times(square(x), jnp.ones((3, 3, 1, 1), x.dtype), self.strides)
        of_kernel = (kernel * kernel).sum((0, 1, 2))
        return compared(dot, patch, of_kernel, self.spherical, *numbers(self, self.features, 1, self.use_bias))


def _patches_times(x: Array, kernel: Array, strides: int) -> Array:
    how: dict[str, Any] = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), _zeros(len(kernel)), **how)


def _zeros(size: int) -> list[tuple[int, int]]:
    return [(size // 2, size // 2)] * 2


def head(f: Mapping[str, Any], x: Array) -> Array:
    """A linear map, or one prototype a class; within a module's call."""
    if f["head"] == "yat":
        return Yat(f["classes"], f["spherical"], f["unit_bias"], name="head")(x)
    return nn.Dense(f["classes"], use_bias=f["family"] == "resnet" or f["linear_bias"], name="head")(x)


class Yat(nn.Module):
    """The ⵟ unit of the last axis."""

    features: int
    spherical: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (..., d) to (..., features)."""
        kernel = self.param("kernel", init.lecun_normal(), (x.shape[-1], self.features))
        dot = product("...d,dn->...n", x, kernel)
        of_kernel = (kernel * kernel).sum(0)
        return compared(dot, square(x), of_kernel, self.spherical, *numbers(self, self.features, 1, self.use_bias))


def compared(dot: Array, x: Array, w: Array, spherical: bool, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """Return α (x·w + b)² / (‖x - w‖² + ε) of x·w, ‖x‖² and ‖w‖²; of x/‖x‖ and w/‖w‖ if `spherical`."""
    if spherical:
        return respond(dot * inverse(x) * inverse(w), 2.0, bias, alpha, epsilon)
    return respond(dot, x + w, bias, alpha, epsilon)


def respond(dot: Array, total: Array | float, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """Return α (x·w + b)² / (‖x - w‖² + ε), total = ‖x‖² + ‖w‖²."""
    return alpha * (dot + bias) ** 2 / (jnp.maximum(total - 2 * dot, 0) + epsilon)


def numbers(module: nn.Module, biases: int, others: int, use_bias: bool) -> tuple[Array, Array, Array]:
    """b = softplus(bias), α and ε = softplus(epsilon_param) of a unit."""
    bias = nn.softplus(module.param("bias", init.zeros, (biases,))) if use_bias else jnp.zeros(biases)
    alpha = module.param("alpha", init.ones, (others,))
    return bias, alpha, nn.softplus(module.param("epsilon_param", init.zeros, (others,)))


def product(equation: str, x: Array, w: Array) -> Array:
    """Multiply float32 numbers as such on accelerators too: distances are differences of products."""
    return jnp.einsum(equation, x, w, precision="highest")


def square(x: Array) -> Array:
    """‖x‖² of the last axis, which stays as 1."""
    return (x * x).sum(-1, keepdims=True)


def inverse(length: Array) -> Array:
    """1/‖x‖ of ‖x‖², 0 of 0."""
    return jnp.where(length > 0, jax.lax.rsqrt(jnp.where(length > 0, length, 1)), 0)


def unit(x: Array) -> Array:
    """x/‖x‖ along the last axis; 0 stays 0."""
    return x * inverse(square(x))
