"""A network that Aether trained, in NumPy: what it computes, to be read. Needs this folder and numpy, nothing else.

model = load("."); logits = model(tokens)    # (b, t) ids -> (b, t, vocab)
model = load("."); logits = model(images)    # (b, h, w, channels), (pixels/255 - mean)/std -> (b, classes)

p["blocks.0.mlp.hidden.kernel"] and so on are the parameters, f the facts of config.json.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray


def load(folder: str, dtype: str = "float32") -> Callable[[Array], Array]:
    """Return the network of an export; `dtype` is what it computes in."""
    f = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["network"]
    with np.load(Path(folder) / "parameters.npz", allow_pickle=False) as file:
        p = {name: wide(file[name]).astype(dtype) for name in file.files}
    network = {"gpt": text_model, "bert": text_model, "vit": vit, "resnet": resnet}[f["family"]]
    return lambda x: network(p, f, x if f["family"] in ("gpt", "bert") else x.astype(dtype))


def wide(a: Array) -> Array:
    """bfloat16, for which npz has no name, is written as the upper halves of float32 numbers."""
    return (a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a


def text_model(p: dict, f: dict, tokens: Array) -> Array:
    """(b, t) ids -> (b, t, vocab)."""
    x = p["embed.embedding"][tokens] * f["embed_scale"]
    if "position.embedding" in p:
        x = x + p["position.embedding"][: tokens.shape[1]]
    x = transformer(p, f, x)
    head = p["head.kernel"] if f["head"] == "untied" else p["embed.embedding"][: f["vocab"]].T
    return x @ head


def vit(p: dict, f: dict, images: Array) -> Array:
    """(b, s, s, c) -> (b, classes)."""
    b, size, _, c = images.shape
    k = f["patch"]
    side = size // k
    patches = images.reshape(b, side, k, side, k, c).swapaxes(2, 3).reshape(b, side * side, k * k * c)
    x = linear(p, "patches", patches)
    if f["pool"] == "class":
        x = np.concatenate([np.broadcast_to(p["token.embedding"], (b, 1, f["width"])), x], 1)
    if "position.embedding" in p:
        x = x + p["position.embedding"]
    x = transformer(p, f, x)
    return head(p, f, x[:, 0] if f["pool"] == "class" else x.mean(1))


def transformer(p: dict, f: dict, x: Array) -> Array:
    """Add to the stream x (b, t, width) what attention and MLP of each block make of it."""
    for k in range(f["layers"]):
        block = f"blocks.{k}"
        x = x + attention(p, f, f"{block}.attention", norm(p, f, f"{block}.norm1", x))
        h = norm(p, f, f"{block}.norm2", x)
        if f["mlp"] == "yat":
            h = yat(p, f, f"{block}.mlp.hidden", h)
        else:
            h = gelu(linear(p, f"{block}.mlp.hidden", h))
        x = x + linear(p, f"{block}.mlp.out", h)
    return norm(p, f, "norm", x)


def attention(p: dict, f: dict, name: str, x: Array) -> Array:
    """Weigh values by a score of queries and keys; heads are the last but one axis of (b, t, h, k)."""
    b, t, width = x.shape
    q, k, v = (linear(p, f"{name}.{part}", x).reshape(b, t, f["heads"], -1) for part in ("query", "key", "value"))
    if f["position"] == "rotary":
        q, k = rotate(q, f["rope_theta"]), rotate(k, f["rope_theta"])
    if f["attention"] == "yat_linear":
        return linear(p, f"{name}.out", linear_attention(p, f, name, unit(q), unit(k), v).reshape(b, t, width))
    if f["attention"] == "yat" and f["spherical"]:
        q, k = unit(q), unit(k)
    dot = np.einsum("bthk,bshk->bhts", q, k)
    if f["attention"] == "yat":
        squares = np.sum(q * q, -1).transpose(0, 2, 1)[..., None] + np.sum(k * k, -1).transpose(0, 2, 1)[:, :, None]
        squares = 2 if f["spherical"] else squares
        bias, alpha, epsilon = (n[..., None, None] for n in numbers(p, name, (f["heads"],)))
        dot = alpha * (dot + bias) ** 2 / (np.maximum(squares - 2 * dot, 0) + epsilon)
    score = dot / math.sqrt(q.shape[-1])
    if f.get("causal"):
        score = np.where(np.tri(t, dtype=bool), score, -np.inf)
    weights = np.exp(score - score.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshk->bthk", weights, v)
    return linear(p, f"{name}.out", y.reshape(b, t, width))


def linear_attention(p: dict, f: dict, name: str, q: Array, k: Array, v: Array) -> Array:
    """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k), φ of the kernel (s + b)²/(2 + ε - 2s): exact to first order, beyond by anchors."""
    b, c = f["kernel_bias"], 2 + f["kernel_epsilon"]
    a0, a1, a2 = b**2 / c, (2 * b + 2 / c * b**2) / c, (c + 2 * b) ** 2 / 4 / c * (2 / c) ** 2
    anchors, whitening = unit(p[f"{name}.anchors"]), p[f"{name}.whitening"]

    def phi(x: Array) -> Array:
        s = np.einsum("bthk,hnk->bthn", x, anchors)
        rest = a2 * s * s / (1 - 2 / c * np.minimum(s, 1))
        rest = np.einsum("bthn,hmn->bthm", rest, whitening)
        return np.concatenate([np.full((*x.shape[:-1], 1), a0**0.5, x.dtype), a1**0.5 * x, rest], -1)

    q, k = phi(q), phi(k)
    sums = np.einsum("bthm,bhmk->bthk", q, np.einsum("bshm,bshk->bhmk", k, v))
    total = np.einsum("bthm,bhm->bth", q, k.sum(1))
    floor = 0.1 * (a0 + a2 / v.shape[-1]) * v.shape[1]
    return sums / np.maximum(total, floor)[..., None]


def rotate(x: Array, theta: float) -> Array:
    """Turn the pairs (2i, 2i + 1) of x (b, t, h, k) by position · theta^(-2i/k)."""
    t, k = x.shape[1], x.shape[-1]
    angle = np.arange(t)[:, None] * theta ** (-np.arange(0, k, 2) / k)
    sin, cos = (g(angle)[:, None].astype(x.dtype) for g in (np.sin, np.cos))
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def resnet(p: dict, f: dict, x: Array) -> Array:
    """(b, h, w, c) -> (b, classes)."""
    stem, block = f["stem"], yat_block if f["units"] == "yat" else relu_block
    make = conv if f["units"] == "yat" else normalized
    x = make(p, f, "stem", x, stem["strides"])
    if stem["pool"]:
        x = windows(x, 3, 2, -np.inf).max((3, 4))
    for s, blocks in enumerate(f["stages"]):
        for k in range(blocks):
            x = block(p, f, f"stages.{s}.{k}", x, 2 if s and not k else 1)
    return head(p, f, x.mean((1, 2)))


def yat_block(p: dict, f: dict, name: str, x: Array, strides: int) -> Array:
    """skip(x) + out(yat(reduce(x))); `reduce`, `skip` only where the block has them; kernels of `out` have zero sum."""
    h = conv(p, f, f"{name}.reduce", x) if f"{name}.reduce.kernel" in p else x
    h = yat_conv(p, f, f"{name}.hidden", h, strides)
    skip = conv(p, f, f"{name}.skip", x, strides) if f"{name}.skip.kernel" in p else x
    kernel = p[f"{name}.out.kernel"]
    kernel = kernel - kernel.mean((0, 1, 2))
    return skip + patches_times(h, kernel, 1) + p[f"{name}.out.bias"]


def relu_block(p: dict, f: dict, name: str, x: Array, strides: int) -> Array:
    """relu(skip(x) + out(hidden(reduce(x)))), all convolutions with BatchNorm."""
    h = normalized(p, f, f"{name}.reduce", x) if f"{name}.reduce.conv.kernel" in p else x
    h = normalized(p, f, f"{name}.out", normalized(p, f, f"{name}.hidden", h, strides), relu=False)
    changes = f"{name}.skip.conv.kernel" in p
    return np.maximum((normalized(p, f, f"{name}.skip", x, strides, relu=False) if changes else x) + h, 0)


def normalized(p: dict, f: dict, name: str, x: Array, strides: int = 1, relu: bool = True) -> Array:
    """BatchNorm of a convolution, by the running statistics."""
    mean, var, scale, bias = (p[f"{name}.norm.{part}"] for part in ("mean", "var", "scale", "bias"))
    y = (conv(p, f, f"{name}.conv", x, strides) - mean) / np.sqrt(var + f["norm_epsilon"]) * scale + bias
    return np.maximum(y, 0) if relu else y


def conv(p: dict, f: dict, name: str, x: Array, strides: int = 1) -> Array:
    """Patches times kernel, plus bias."""
    return patches_times(x, p[f"{name}.kernel"], strides) + p.get(f"{name}.bias", 0)


def patches_times(x: Array, kernel: Array, strides: int) -> Array:
    """The product of every patch of x with the kernels (k, k, in, out)."""
    return np.einsum("bhwijc,ijco->bhwo", windows(x, len(kernel), strides), kernel, optimize=True)


def yat_conv(p: dict, f: dict, name: str, x: Array, strides: int) -> Array:
    """The ⵟ unit of every patch; the zeros around the image are entries of patches."""
    kernel = p[f"{name}.kernel"]
    patches = windows(x, len(kernel), strides)
    patches = patches.reshape(*patches.shape[:3], -1)
    return kernel_unit(patches, kernel.reshape(-1, kernel.shape[-1]), f["spherical"], *numbers(p, name, (1,)))


def windows(x: Array, size: int, strides: int, fill: float = 0.0) -> Array:
    """(b, h, w, c) -> (b, h', w', size, size, c), with size // 2 entries of `fill` on every side."""
    n = size // 2
    x = np.pad(x, ((0, 0), (n, n), (n, n), (0, 0)), constant_values=fill)
    seen = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::strides, ::strides]
    return np.moveaxis(seen, 3, -1)


def head(p: dict, f: dict, x: Array) -> Array:
    """A linear map, or one prototype a class."""
    return yat(p, f, "head", x) if f["head"] == "yat" else linear(p, "head", x)


def yat(p: dict, f: dict, name: str, x: Array) -> Array:
    """The ⵟ unit of the last axis."""
    return kernel_unit(x, p[f"{name}.kernel"], f["spherical"], *numbers(p, name, (1,)))


def kernel_unit(x: Array, w: Array, spherical: bool, bias: Array, alpha: Array, epsilon: Array) -> Array:
    """α (x·w + b)² / (‖x - w‖² + ε), of unit vectors if `spherical`."""
    squares = np.sum(x * x, -1, keepdims=True) + np.sum(w * w, 0)
    if spherical:
        x, w, squares = unit(x), unit(w.T).T, 2
    dot = x @ w
    return alpha * (dot + bias) ** 2 / (np.maximum(squares - 2 * dot, 0) + epsilon)


def numbers(p: dict, name: str, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """b = softplus(bias), α and ε = softplus(epsilon_param) of a unit."""
    alpha = p[f"{name}.alpha"]
    bias = softplus(p[f"{name}.bias"]) if f"{name}.bias" in p else np.zeros(shape, alpha.dtype)
    return bias, alpha, softplus(p[f"{name}.epsilon_param"])


def softplus(x: Array) -> Array:
    """log(1 + e^x)."""
    return np.logaddexp(x, x.dtype.type(0))


def unit(x: Array) -> Array:
    """x/‖x‖ along the last axis; 0 stays 0."""
    length = np.sqrt(np.sum(x * x, -1, keepdims=True))
    return x / np.where(length > 0, length, 1)


def linear(p: dict, name: str, x: Array) -> Array:
    """x·kernel + bias."""
    return x @ p[f"{name}.kernel"] + p.get(f"{name}.bias", 0)


def gelu(x: Array) -> Array:
    """By tanh, as in GPT-2."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(p: dict, f: dict, name: str, x: Array) -> Array:
    """LayerNorm where there is one."""
    if f"{name}.scale" not in p:
        return x
    x = x - x.mean(-1, keepdims=True)
    y: Any = x / np.sqrt((x * x).mean(-1, keepdims=True) + f["norm_epsilon"]) * p[f"{name}.scale"]
    return y + p.get(f"{name}.bias", 0)
