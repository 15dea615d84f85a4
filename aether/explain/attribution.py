"""What made a logit: the exact shares of layers, units, and tokens or places.

The residual stream is a sum, so a logit that is linear in it is the sum of what each layer put there. A layer's share
is again a sum, over the units behind which a linear map stands, or over the positions that attention looked at. What is
not linear at the end of a network is taken at its value for this input: the standard deviation of a LayerNorm, the
ratio n/(D + ε) of a ⵟ head, and in the ResNet baseline which of its ReLUs let pass. The shares then add up to the logit
but for rounding. Positions are those of a layer's input: what attention moved there before counts as theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.errors import InputError
from aether.explain.layers import blocks_of
from aether.kernels.yat import unit
from aether.models.block import MLP
from aether.models.resnet import NormalizedConv, ResNet
from aether.models.vit import ViT, cut
from aether.nn import LayerNorm, Linear, YatNMN


@dataclass(frozen=True)
class Attribution:
    """The shares in one logit.

    Attributes:
      logit: as the network computes it.
      layers: share of each layer, `embed`, `blocks.0.attention`, `stages.1.0`, ...; `constant` is what biases add at
        the end. They add up to the logit.
      units: of a layer with hidden units, the share of each, (units,); with its `bias` they add up to the layer's.
      sources: of attention, the share of each head and position, (heads, positions); of convolutions, of each place,
        (height, width).
      weights: of attention, what the rows that are read give to each position, (heads, rows, positions): shares of a
        mean, none negative and of sum 1; of linear attention, as its features have it.
      bias: share of the bias of each layer's last map.
    """

    logit: float
    layers: dict[str, float]
    units: dict[str, np.ndarray]
    sources: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    bias: dict[str, float]

    def top_units(self, count: int = 10) -> list[tuple[str, int, float]]:
        """Return (layer, unit, share) of the units with the largest shares, by size, whatever the sign."""
        return _top(self.units, count)

    def top_sources(self, count: int = 10) -> list[tuple[str, int, float]]:
        """Return (layer, position or place, share), summed over heads; places are counted row by row."""
        flat = {name: (a.sum(0) if name in self.weights else a.ravel()) for name, a in self.sources.items()}
        return _top(flat, count)


def _top(shares: dict[str, np.ndarray], count: int) -> list[tuple[str, int, float]]:
    found = [(name, int(k), float(a[k])) for name, a in shares.items() for k in np.argsort(-np.abs(a))[:count]]
    return sorted(found, key=lambda one: -abs(one[2]))[:count]


def attribute(model: Any, x: np.ndarray, target: int, position: int = -1) -> Attribution:
    """Take a logit apart.

    Args:
      model: a network of `aether.models`, in float32.
      x: ids (t,), or a normalised image (s, s, channels).
      target: the id or class whose logit it is.
      position: of texts, the one whose logits are meant; the last by default.

    Raises:
      InputError: there is no such id, class or position, or x has another shape.
    """
    x = np.asarray(x)
    text = not isinstance(model, ViT | ResNet)
    classes = model.vocab if text else model.config.classes
    if x.ndim != (1 if text else 3) or not x.size:
        raise InputError(f"The input is {x.shape}; give {'one row of ids' if text else 'one image, channels last'}.")
    if not 0 <= target < classes:
        raise InputError(f"The target is {target}; the network has logits 0 to {classes - 1}.")
    if text and not -len(x) <= position < len(x):
        raise InputError(f"The position is {position}; the text has {len(x)}, counted from 0.")
    graph, state = nnx.split(model)
    logit, *found = jax.device_get(_attribute(graph, state, jnp.asarray(x), target, position % len(x)))
    layers, units, sources, weights, bias = ({n: part[n] for n in _names(model) if n in part} for part in found)
    numbers = ({name: float(a) for name, a in part.items()} for part in (layers, bias))
    return Attribution(float(logit), next(numbers), units, sources, weights, next(numbers))


def _names(model: Any) -> list[str]:
    """Return what shares may be called, in the order of the forward pass, which what `jit` returns has not."""
    if isinstance(model, ResNet):
        blocks = [f"stages.{s}.{k}" for s, count in enumerate(model.config.blocks) for k in range(count)]
        return ["stem", *blocks, "constant"]
    parts = [f"blocks.{k}.{part}" for k in range(model.config.layers) for part in ("attention", "mlp")]
    return ["embed", "position", *parts, "constant"]


@partial(jax.jit, static_argnums=0)
def _attribute(graph: nnx.GraphDef, state: nnx.State, x: Array, target: Array, position: Array) -> tuple:
    model: Any = nnx.merge(graph, state)
    with jax.default_matmul_precision("highest"):
        return (_of_resnet if isinstance(model, ResNet) else _of_transformer)(model, x, target, position)


def _of_transformer(model: Any, x: Array, target: Array, position: Array) -> tuple:
    layers, stream = _embedded(model, x)
    if not isinstance(model, ViT):
        rows = position[None]
    else:
        rows = jnp.arange(1 if model.config.pool == "class" else stream.shape[0])
    seen: dict[str, Any] = {}
    for name, block in blocks_of(model).items():
        y = block.norm1(stream) if block.norm1 else stream
        weights, values = block.attention.weights(y[None], rows, is_causal=block.causal)
        out = block.attention(y[None], is_causal=block.causal)[0][0]
        seen[f"{name}.attention"] = (block.attention.out, weights[0], values[0], out[rows])
        stream = stream + out
        y = block.norm2(stream) if block.norm2 else stream
        hidden = block.mlp.hidden(y[rows])
        hidden = jax.nn.gelu(hidden) if isinstance(block.mlp, MLP) else hidden
        out = block.mlp(y)
        seen[f"{name}.mlp"] = (block.mlp.out, hidden, out[rows])
        stream = stream + out
    direction, constant, logit = _readout(model, stream[rows], target)
    shares: dict[str, Array] = {name: jnp.sum(a[rows] * direction) for name, a in layers.items()}
    units, sources, looks, biases = {}, {}, {}, {}
    for name, (last, *parts) in seen.items():
        behind = direction @ last.kernel[...].T
        shares[name] = jnp.sum(parts[-1] * direction)
        biases[name] = jnp.zeros(()) if last.bias is None else jnp.sum(last.bias[...] * direction)
        if name.endswith("mlp"):
            units[name] = jnp.sum(parts[0] * behind, 0)
        else:
            looks[name], values = parts[:2]
            behind = behind.reshape(len(rows), *values.shape[1:])
            sources[name] = jnp.einsum("hrs,shk,rhk->hs", looks[name], values, behind)
    return logit, shares | {"constant": constant}, units, sources, looks, biases


def _embedded(model: Any, x: Array) -> tuple[dict[str, Array], Array]:
    """Return what the stream starts as, by its parts, and their sum (t, d)."""
    if isinstance(model, ViT):
        found = dict(embed=model.patches(cut(x[None], model.config.patch))[0])
        if model.token is not None:
            found = dict(embed=jnp.concatenate([model.token.embedding[...], found["embed"]]))
    else:
        found = dict(embed=model.gain * model.embed(x))
    if model.position is not None:
        found["position"] = model.position.embedding[...][: len(found["embed"])]
    return found, sum(found.values(), jnp.zeros(()))


def _readout(model: Any, rows: Array, target: Array) -> tuple[Array, Array, Array]:
    """Return (directions (r, d), constant, logit) with logit = Σ rows · directions + constant for these rows."""
    normal = model.norm(rows) if model.norm else rows
    if isinstance(model, ViT):
        pooled = normal.mean(0)
        kernel, constant = _head(model.head, pooled, target)
        kernel, logit = kernel / len(rows), model.head(pooled)[target]
    else:
        kernel, constant = model.head_kernel()[:, target], jnp.zeros(())
        logit = model.logits(normal[None])[0, 0, target]
    if not isinstance(model.norm, LayerNorm):
        return jnp.broadcast_to(kernel, rows.shape), constant, logit
    scaled, (inverse, shift) = kernel * model.norm.scale[...], _frozen(model.norm, rows)
    return inverse * (scaled - scaled.mean()), constant + len(rows) * jnp.sum(shift * kernel), logit


def _frozen(norm: LayerNorm, rows: Array) -> tuple[Array, Array]:
    """Return 1/√(variance + ε) of each row, (r, 1), and the bias."""
    inverse = jax.lax.rsqrt(jnp.var(rows, -1, keepdims=True) + norm.epsilon)
    return inverse, jnp.zeros(()) if norm.bias is None else norm.bias[...]


def _head(head: Linear | YatNMN, z: Array, target: Array) -> tuple[Array, Array]:
    """Return (direction, constant) with logit = z · direction + constant, for this z."""
    if isinstance(head, Linear):
        return head.kernel[...][:, target], jnp.zeros(()) if head.bias is None else head.bias[...][target]
    w, own = head.prototypes(None, "float32")[:, target], head.unit()
    bias, alpha, epsilon = (_of_unit(own[k], head, target) for k in ("bias", "alpha", "epsilon"))
    z, w, length = (z, w, 1.0) if not head.spherical else (unit(z), unit(w), jnp.linalg.norm(z))
    n = z @ w + bias
    ratio = alpha * n / (jnp.maximum(z @ z + w @ w - 2 * z @ w, 0.0) + epsilon)
    return ratio * w / length, ratio * bias


def _of_unit(number: Array | float, head: YatNMN, target: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(number), (head.kernel_shape[1],))[target]


def _of_resnet(model: ResNet, x: Array, target: Array, position: Array) -> tuple:
    start = _run(model.stem)(x[None])
    if model.config.stem == "imagenet":
        start = nnx.max_pool(start, (3, 3), (2, 2), ((1, 1), (1, 1)))
    stream, seen = start, {}
    for name, block in blocks_of(model).items():
        hidden = _run(block.hidden)(stream if block.reduce is None else _run(block.reduce)(stream))
        out, skip = _run(block.out), None if block.skip is None else _run(block.skip)
        together = (stream if skip is None else skip(stream)) + out(hidden)
        passes = together > 0 if model.config.kind == "resnet" else None
        seen[name] = (stream, hidden, out, skip, passes)
        stream = together if passes is None else jnp.where(passes, together, 0.0)
    pooled = stream.mean((0, 1, 2))
    direction, constant = _head(model.head, pooled, target)
    logit = model.head(pooled)[target]
    back = jnp.broadcast_to(direction / stream[0, ..., 0].size, stream.shape)
    shares, units, sources, biases = {}, {}, {}, {}
    for name, (before, hidden, out, skip, passes) in reversed(seen.items()):
        back = back if passes is None else jnp.where(passes, back, 0.0)
        each = hidden * _transposed(out, hidden, back)
        units[name], sources[name] = each.sum((0, 1, 2)), each.sum((0, 3))
        biases[name] = jnp.sum(back * out(jnp.zeros_like(hidden)))
        shares[name] = jnp.sum(back * out(hidden))
        if skip is not None:
            constant += jnp.sum(back * skip(jnp.zeros_like(before)))
            back = _transposed(skip, before, back)
    shares["stem"] = jnp.sum(back * start)
    return logit, shares | {"constant": constant}, units, sources, {}, biases


def _run(part: Any) -> Callable[[Array], Array]:
    """Return a function of x alone of a part of a ResNet."""
    return partial(part, train=False) if isinstance(part, NormalizedConv) else part


def _transposed(affine: Callable[[Array], Array], x: Array, back: Array) -> Array:
    """Return Lᵀ back of an affine map L x + c."""
    return jax.vjp(affine, x)[1](back)[0]
