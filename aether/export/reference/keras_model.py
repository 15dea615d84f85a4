"""A network that Aether trained, in Keras 3: what it computes, to be read. Needs this folder and keras, nothing else.

network = load("."); logits = network(tokens)    # (b, t) ids -> (b, t, vocab)
network = load("."); logits = network(images)    # (b, h, w, channels), (pixels/255 - mean)/std -> (b, classes)

All of it is `keras.ops`, so it runs on JAX, PyTorch and TensorFlow, whichever KERAS_BACKEND names. network.keras holds
the facts of the network and its weights; loading it needs the classes below and unpickles nothing.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

Tensor = Any
register = keras.saving.register_keras_serializable(package="aether")


def load(folder: str) -> keras.Model:
    """Return the network of an export."""
    return keras.saving.load_model(Path(folder) / "network.keras", compile=False)


@register
class Kept(keras.DTypePolicy):
    """Weights are kept in the dtype that it names; what is computed is float32."""

    @property
    def compute_dtype(self) -> str:
        """Of all layers."""
        return "float32"


class Plan(NamedTuple):
    """What layers are made from: the facts of config.json, the shape of every parameter by name, and a dtype policy."""

    facts: dict[str, Any]
    shapes: dict[str, list[int]]
    dtype: keras.DTypePolicy

    def has(self, name: str) -> bool:
        """Say whether the network has this parameter."""
        return name in self.shapes


@register
class Network(keras.Model):
    """The whole network, of any family."""

    def __init__(self, facts: dict[str, Any], shapes: dict[str, list[int]], kept: str = "float32", **kwargs: Any):
        super().__init__(dtype=Kept(kept), **kwargs)
        self.plan = dict(facts=facts, shapes=shapes, kept=kept)
        make, self.forward = {
            "gpt": (self.make_text, self.text),
            "bert": (self.make_text, self.text),
            "vit": (self.make_vit, self.vit),
            "resnet": (self.make_resnet, self.resnet),
        }[facts["family"]]
        make(Plan(facts, shapes, self.dtype_policy), facts)
        self.built = True  # layers make their weights as they are made

    def get_config(self) -> dict[str, Any]:
        """Return what another Network is made from."""
        return dict(self.plan, name=self.name)

    def call(self, inputs: Tensor) -> Tensor:
        """Ids or images -> logits."""
        return self.forward(inputs)

    def parameter(self, name: str) -> keras.Variable:
        """Return what the export calls `name`, such as blocks.0.mlp.hidden.kernel."""
        *path, leaf = name.split(".")
        part: Any = self
        for step in path:
            part = part[int(step)] if step.isdigit() else getattr(part, step)
        names = {"embedding": "embeddings", "scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}
        if leaf == "bias" and hasattr(part, "beta"):
            leaf = "beta"
        return getattr(part, names.get(leaf, leaf))

    def make_text(self, p: Plan, f: dict) -> None:
        """Layers of `text`."""
        self.embed = embedding(p, "embed")
        self.make_transformer(p, f)
        self.head: Any = dense(p, "head") if f["head"] == "untied" else None
        self.vocab, self.embed_scale = f["vocab"], f["embed_scale"]

    def text(self, tokens: Tensor) -> Tensor:
        """(b, t) ids -> (b, t, vocab)."""
        x = self.embed(tokens) * self.embed_scale
        if self.position is not None:
            x = x + self.position.embeddings[: ops.shape(tokens)[1]]
        x = self.transformer(x)
        if self.head is not None:
            return self.head(x)
        return ops.matmul(x, ops.transpose(self.embed.embeddings[: self.vocab]))

    def make_vit(self, p: Plan, f: dict) -> None:
        """Layers of `vit`."""
        self.patches = dense(p, "patches")
        self.token = embedding(p, "token") if f["pool"] == "class" else None
        self.make_transformer(p, f)
        self.head = classes(p)
        self.patch, self.side, self.channels = f["patch"], f["image_size"] // f["patch"], f["channels"]

    def vit(self, images: Tensor) -> Tensor:
        """(b, s, s, c) -> (b, classes)."""
        k, side, c = self.patch, self.side, self.channels
        patches = ops.transpose(ops.reshape(images, (-1, side, k, side, k, c)), (0, 1, 3, 2, 4, 5))
        x = self.patches(ops.reshape(patches, (-1, side * side, k * k * c)))
        if self.token is not None:
            first = self.token(ops.zeros_like(x[:, :1, 0], dtype="int32"))
            x = ops.concatenate([first, x], 1)
        if self.position is not None:
            x = x + self.position.embeddings
        x = self.transformer(x)
        return self.head(x[:, 0] if self.token is not None else ops.mean(x, 1))

    def make_transformer(self, p: Plan, f: dict) -> None:
        """Layers of `transformer`, and learned positions."""
        self.position = embedding(p, "position") if p.has("position.embedding") else None
        self.blocks = [Block(p, f"blocks.{k}") for k in range(f["layers"])]
        self.norm = layer_norm(p, "norm")

    def transformer(self, x: Tensor) -> Tensor:
        """Take the stream x (b, t, width) through the blocks."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def make_resnet(self, p: Plan, f: dict) -> None:
        """Layers of `resnet`."""
        block, stem = YatBlock if f["units"] == "yat" else ReluBlock, f["stem"]
        self.stem = (Conv if f["units"] == "yat" else NormedConv)(p, "stem", stem["strides"])
        self.pool = stem["pool"]
        self.stages = [
            [block(p, f"stages.{s}.{k}", 2 if s and not k else 1) for k in range(count)]
            for s, count in enumerate(f["stages"])
        ]
        self.head = classes(p)

    def resnet(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, classes)."""
        x = self.stem(x)
        if self.pool:
            x = ops.max_pool(padded(x, 3, -math.inf), 3, 2, "valid", data_format="channels_last")
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(ops.mean(x, (1, 2)))


class Part(keras.layers.Layer):
    """A layer with the weights that the network has under its name; anchors, and what is made of them, stay."""

    def __init__(self, p: Plan, name: str):
        super().__init__(dtype=p.dtype, name=name.rpartition(".")[2])
        for path, shape in p.shapes.items():
            parent, _, leaf = path.rpartition(".")
            if parent == name:
                trained = leaf not in ("anchors", "whitening")
                dtype = "float32" if leaf == "whitening" else p.dtype.variable_dtype
                weight = self.add_weight(tuple(shape), "zeros", dtype, trainable=trained, name=leaf)
                setattr(self, leaf, weight)


class Block(Part):
    """Add to the stream what attention and MLP make of it."""

    def __init__(self, p: Plan, name: str):
        super().__init__(p, name)
        self.norm1, self.norm2 = layer_norm(p, f"{name}.norm1"), layer_norm(p, f"{name}.norm2")
        self.attention, self.mlp = Attention(p, f"{name}.attention"), MLP(p, f"{name}.mlp")

    def call(self, x: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MLP(Part):
    """A ⵟ layer, or a linear one with GELU by tanh as in GPT-2, and a linear one."""

    def __init__(self, p: Plan, name: str):
        super().__init__(p, name)
        self.gelu = p.facts["mlp"] == "gelu"
        self.hidden = (dense if self.gelu else Yat)(p, f"{name}.hidden")
        self.out = dense(p, f"{name}.out")

    def call(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        h = self.hidden(x)
        return self.out(ops.gelu(h, approximate=True) if self.gelu else h)


class Attention(Part):
    """Weigh values by a score of queries and keys; heads are the last but one axis of (b, t, h, k)."""

    def __init__(self, p: Plan, name: str):
        super().__init__(p, name)
        f = p.facts
        self.kind, self.heads, self.spherical, self.causal = f["attention"], f["heads"], f["spherical"], f.get("causal")
        self.theta = f["rope_theta"] if f["position"] == "rotary" else None
        self.kernel_bias, self.kernel_epsilon = f.get("kernel_bias", 0.0), f.get("kernel_epsilon", 0.0)
        self.query, self.key = dense(p, f"{name}.query"), dense(p, f"{name}.key")
        self.value, self.out = dense(p, f"{name}.value"), dense(p, f"{name}.out")

    def call(self, x: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, width)."""
        t, width = ops.shape(x)[1], x.shape[-1]
        q, k, v = (
            ops.reshape(part(x), (-1, t, self.heads, width // self.heads))
            for part in (self.query, self.key, self.value)
        )
        if self.theta is not None:
            q, k = rotate(q, self.theta), rotate(k, self.theta)
        y = self.linear(unit(q), unit(k), v) if self.kind == "yat_linear" else self.softmax(q, k, v)
        return self.out(ops.reshape(y, (-1, t, width)))

    def softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Weigh by e^(score/√k), the score a dot product or the ⵟ unit of each head."""
        t = ops.shape(q)[1]
        score = ops.einsum("bthk,bshk->bhts", q, k)
        if self.kind == "yat":
            s = [ops.transpose(ops.sum(ops.square(x), -1), (0, 2, 1)) for x in (q, k)]
            numbers = [n[..., None, None] for n in numbers_of(self)]
            score = yat(score, s[0][..., None], s[1][:, :, None], self.spherical, *numbers)
        score = score / math.sqrt(q.shape[-1])
        if self.causal:
            position = ops.arange(t)
            score = ops.where(position[:, None] >= position, score, -math.inf)
        return ops.einsum("bhts,bshk->bthk", ops.softmax(score), v)

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k), φ of the kernel (s + b)²/(2 + ε - 2s): to first order exact, then by anchors."""
        b, c = self.kernel_bias, 2 + self.kernel_epsilon
        a0, a1, a2 = b**2 / c, (2 * b + 2 / c * b**2) / c, (c + 2 * b) ** 2 / 4 / c * (2 / c) ** 2

        def phi(x: Tensor) -> Tensor:
            s = ops.einsum("bthk,hnk->bthn", x, unit(self.anchors))
            rest = a2 * s * s / (1 - 2 / c * ops.minimum(s, 1.0))
            rest = ops.einsum("bthn,hmn->bthm", rest, self.whitening)
            return ops.concatenate([ops.full_like(x[..., :1], a0**0.5), a1**0.5 * x, rest], -1)

        q, k = phi(q), phi(k)
        sums = ops.einsum("bthm,bhmk->bthk", q, ops.einsum("bshm,bshk->bhmk", k, v))
        total = ops.einsum("bthm,bhm->bth", q, ops.sum(k, 1))
        floor = 0.1 * (a0 + a2 / v.shape[-1]) * ops.cast(ops.shape(v)[1], v.dtype)
        return sums / ops.maximum(total, floor)[..., None]


class Yat(Part):
    """The ⵟ unit of the last axis."""

    def __init__(self, p: Plan, name: str):
        super().__init__(p, name)
        self.spherical = p.facts["spherical"]

    def call(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        s = ops.sum(ops.square(x), -1, keepdims=True), ops.sum(ops.square(self.kernel), 0)
        return yat(ops.matmul(x, self.kernel), *s, self.spherical, *numbers_of(self))


class Conv(Part):
    """The product of every patch with the kernels (k, k, in, out), plus bias; `centred` ones have zero sum."""

    def __init__(self, p: Plan, name: str, strides: int = 1, centred: bool = False):
        super().__init__(p, name)
        self.strides, self.centred = strides, centred

    def call(self, x: Tensor) -> Tensor:
        """(b, h, w, in) -> (b, h', w', out)."""
        kernel = ops.convert_to_tensor(self.kernel)
        if self.centred:
            kernel = kernel - ops.mean(kernel, (0, 1, 2))
        y = convolved(x, kernel, self.strides)
        return y + self.bias if hasattr(self, "bias") else y


class YatConv(Part):
    """The ⵟ unit of every patch; the zeros around the image are entries of patches."""

    def __init__(self, p: Plan, name: str, strides: int = 1):
        super().__init__(p, name)
        self.spherical, self.strides = p.facts["spherical"], strides

    def call(self, x: Tensor) -> Tensor:
        """(b, h, w, in) -> (b, h', w', out)."""
        window = ops.ones((*self.kernel.shape[:2], 1, 1), x.dtype)
        s = convolved(ops.sum(ops.square(x), -1, keepdims=True), window, self.strides)
        dot = convolved(x, ops.convert_to_tensor(self.kernel), self.strides)
        return yat(dot, s, ops.sum(ops.square(self.kernel), (0, 1, 2)), self.spherical, *numbers_of(self))


class NormedConv(Part):
    """BatchNorm of a convolution, and ReLU."""

    def __init__(self, p: Plan, name: str, strides: int = 1, relu: bool = True):
        super().__init__(p, name)
        self.conv, self.relu = Conv(p, f"{name}.conv", strides), relu
        self.norm = keras.layers.BatchNormalization(epsilon=p.facts["norm_epsilon"], dtype=p.dtype)
        self.norm.build((None, None, None, *p.shapes[f"{name}.norm.scale"]))

    def call(self, x: Tensor) -> Tensor:
        """(b, h, w, in) -> (b, h', w', out)."""
        y = self.norm(self.conv(x))
        return ops.relu(y) if self.relu else y


class YatBlock(Part):
    """skip(x) + out(yat(reduce(x))); `reduce`, `skip` only where the block has them."""

    def __init__(self, p: Plan, name: str, strides: int):
        super().__init__(p, name)
        self.reduce = Conv(p, f"{name}.reduce") if p.has(f"{name}.reduce.kernel") else identity
        self.hidden, self.out = YatConv(p, f"{name}.hidden", strides), Conv(p, f"{name}.out", centred=True)
        self.skip = Conv(p, f"{name}.skip", strides) if p.has(f"{name}.skip.kernel") else identity

    def call(self, x: Tensor) -> Tensor:
        """(b, h, w, in) -> (b, h', w', out)."""
        return self.skip(x) + self.out(self.hidden(self.reduce(x)))


class ReluBlock(Part):
    """relu(skip(x) + out(hidden(reduce(x))))."""

    def __init__(self, p: Plan, name: str, strides: int):
        super().__init__(p, name)
        self.reduce = NormedConv(p, f"{name}.reduce") if p.has(f"{name}.reduce.conv.kernel") else identity
        self.hidden = NormedConv(p, f"{name}.hidden", strides)
        self.out = NormedConv(p, f"{name}.out", relu=False)
        changes = p.has(f"{name}.skip.conv.kernel")
        self.skip = NormedConv(p, f"{name}.skip", strides, relu=False) if changes else identity

    def call(self, x: Tensor) -> Tensor:
        """(b, h, w, in) -> (b, h', w', out)."""
        return ops.relu(self.skip(x) + self.out(self.hidden(self.reduce(x))))


def yat(dot: Tensor, s: Tensor, z: Tensor, spherical: bool, bias: Tensor, alpha: Tensor, epsilon: Tensor) -> Tensor:
    """α (x·w + b)² / (‖x - w‖² + ε) of x·w, s = ‖x‖² and z = ‖w‖²; of unit vectors if `spherical`, where 0 stays 0."""
    if spherical:
        lengths = [ops.sqrt(ops.where(n > 0, n, 1.0)) for n in (s, z)]
        dot, s, z = dot / (lengths[0] * lengths[1]), 1.0, 1.0
    return alpha * ops.square(dot + bias) / (ops.maximum(s + z - 2 * dot, 0.0) + epsilon)


def numbers_of(layer: Part) -> tuple[Tensor, Tensor, Tensor]:
    """b = softplus(bias), α and ε = softplus(epsilon_param) of a unit."""
    alpha = ops.convert_to_tensor(layer.alpha)
    bias = ops.softplus(layer.bias) if hasattr(layer, "bias") else ops.zeros_like(alpha)
    return bias, alpha, ops.softplus(layer.epsilon_param)


def unit(x: Tensor) -> Tensor:
    """x/‖x‖ along the last axis; 0 stays 0."""
    square = ops.sum(ops.square(x), -1, keepdims=True)
    return x / ops.sqrt(ops.where(square > 0, square, 1.0))


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of x (b, t, h, k) by position · theta^(-2i/k)."""
    k = x.shape[-1]
    frequency = np.asarray(theta ** (-np.arange(0, k, 2) / k), np.float32)
    angle = ops.cast(ops.arange(ops.shape(x)[1]), x.dtype)[:, None, None] * frequency
    sin, cos, even, odd = ops.sin(angle), ops.cos(angle), x[..., ::2], x[..., 1::2]
    return ops.reshape(ops.stack([even * cos - odd * sin, odd * cos + even * sin], -1), ops.shape(x))


def convolved(x: Tensor, kernel: Tensor, strides: int) -> Tensor:
    """Convolve, with size // 2 zeros on every side; Keras' own "same" padding lies otherwise where strides are 2."""
    return ops.conv(padded(x, kernel.shape[0], 0.0), kernel, strides, "valid", data_format="channels_last")


def padded(x: Tensor, size: int, fill: float) -> Tensor:
    """Put size // 2 entries of `fill` on every side of images (b, h, w, c)."""
    n = size // 2
    return ops.pad(x, ((0, 0), (n, n), (n, n), (0, 0)), constant_values=fill)


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


def dense(p: Plan, name: str) -> keras.layers.Dense:
    """x·kernel + bias."""
    inputs, outputs = p.shapes[f"{name}.kernel"]
    options = dict(use_bias=p.has(f"{name}.bias"), kernel_initializer="zeros", name=name.rpartition(".")[2])
    return _built(keras.layers.Dense(outputs, dtype=p.dtype, **options), (None, inputs))


def embedding(p: Plan, name: str) -> keras.layers.Embedding:
    """Rows by number."""
    rows, width = p.shapes[f"{name}.embedding"]
    return _built(
        keras.layers.Embedding(rows, width, embeddings_initializer="zeros", dtype=p.dtype, name=name), (None,)
    )


def layer_norm(p: Plan, name: str) -> Callable[[Tensor], Tensor]:
    """LayerNorm where there is one."""
    if not p.has(f"{name}.scale"):
        return identity
    options = dict(epsilon=p.facts["norm_epsilon"], center=p.has(f"{name}.bias"), name=name.rpartition(".")[2])
    return _built(keras.layers.LayerNormalization(dtype=p.dtype, **options), (None, *p.shapes[f"{name}.scale"]))


def classes(p: Plan) -> keras.layers.Layer:
    """A linear map, or one prototype a class."""
    return Yat(p, "head") if p.facts["head"] == "yat" else dense(p, "head")


def _built(layer: keras.layers.Layer, shape: tuple[int | None, ...]) -> keras.layers.Layer:
    layer.build(shape)
    return layer
