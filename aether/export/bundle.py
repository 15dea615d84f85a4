"""What an export is made of: the facts of a network, and its parameters by name, block by block.

Names are those of the modules here and `nmn`'s: `embed.embedding` (ids, width), `blocks.3.attention.query.kernel` (in,
out), `stages.0.1.hidden.kernel` (k, k, in, out). Against a checkpoint, stacked blocks are taken apart, rows and columns
that pad a vocabulary are gone, a tied head has no array, and beside the `anchors` of linear attention stands
`whitening`, L⁻¹ of their Gram matrix, always in float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aether.config import Config, ModelConfig
from aether.errors import InputError
from aether.export.source import DTYPES, FORMAT, Parameters
from aether.kernels import features
from aether.models.block import USUAL_STD

NORM_EPSILON = 1e-5  # of LayerNorm and BatchNorm

_STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "stride2": (3, 2, False)}
_TRANSFORMER = ("layers", "heads", "width", "hidden", "attention", "mlp", "norm", "position", "head", "spherical")


def facts_of(config: Config) -> dict[str, Any]:
    """Return what a reader needs beside the parameters to compute what the network computes, as JSON takes it."""
    m = config.model
    facts: dict[str, Any] = dict(format=FORMAT, family=m.family, kind=m.kind, norm_epsilon=NORM_EPSILON)
    if m.family == "resnet":
        size, strides, pooled = _STEMS[m.stem]
        stem = dict(size=size, strides=strides, pool=pooled)
        facts |= dict(stages=list(m.blocks), width=m.width, hidden=m.units(0), head=m.head, stem=stem)
        facts |= dict(bottleneck=m.bottleneck, units="relu" if m.kind == "resnet" else "yat")
        facts |= dict(spherical=m.conv_spherical, linear_bias=True, unit_bias=m.conv_bias > 0)
    else:
        facts |= {name: getattr(m, name) for name in _TRANSFORMER} | dict(rope_theta=m.rope_theta)
        facts |= dict(linear_bias=m.linear_bias == "yes", unit_bias=m.yat_bias > 0)
    if m.attention == "yat_linear":
        width = m.width // m.heads
        anchors = (m.features or 4 * width) - 1 - width
        facts |= dict(kernel_bias=m.yat_bias, kernel_epsilon=m.epsilon, anchors=anchors)
    if m.family == "vit":
        facts |= dict(patch=m.patch, pool=m.pool)
    if m.task == "classify":
        i = config.image
        return facts | dict(classes=m.classes, image_size=i.size, channels=i.channels, mean=i.mean, std=i.std)
    scale = m.embed_std / USUAL_STD if m.head == "tied" else 1.0  # see aether.models.text
    return facts | dict(vocab=m.vocab, context=config.data.context, causal=m.task == "lm", embed_scale=scale)


def portable(config: Config) -> Config:
    """Return the config of the same network in float32, in the forms that every platform and length takes."""
    free: dict[str, Any] = dict(dtype="float32", attention_impl="plain", scan_layers=False, remat="none")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **free))


def parameters_of(config: Config, state: nnx.State, dtype: str = "float32") -> Parameters:
    """Return the parameters of a network by name, in `dtype`; views of those of `state` where they can be.

    An array that lies on several devices is put together in the host's memory, one after the other.
    """
    there = _Names(config.model)
    found: Parameters = {}
    for path, variable in nnx.to_flat_state(state):
        value = np.asarray(variable[...])
        for name, take in there.of(path):
            part = there.trimmed(name, take(value)).astype(DTYPES[dtype], copy=False)
            found[name] = part
            if name.endswith(".anchors"):
                found[name.removesuffix("anchors") + "whitening"] = _whitening(part, config.model)
    return found


def state_of(config: Config, like: nnx.State, parameters: Mapping[str, Any], xp: Any = np) -> nnx.State:
    """Return the state of which these are the parameters, float32 on the host, in the form of `like`.

    With `xp` = jax.numpy it can be traced.

    Raises:
      InputError: one is missing, is not of the network, or has another shape.
    """
    there, used, flat = _Names(config.model), set(), []
    for path, variable in nnx.to_flat_state(like):
        parts = []
        for name, take in there.of(path):
            want = there.trimmed(name, take(np.broadcast_to(np.float32(0), variable.shape))).shape
            if name not in parameters:
                raise InputError(f"The export has no array {name}, which this network has; use the files it came with.")
            part = xp.asarray(parameters[name], np.float32)
            if part.shape != want:
                raise InputError(f"The export has {name} as {part.shape}, and this network as {want}.")
            used.add(name)
            parts.append(part)
        whole = xp.stack(parts) if there.stacked(path) else parts[0]
        after = [(0, size - n) for size, n in zip(variable.shape, whole.shape, strict=True)]
        flat.append((path, variable.replace(xp.pad(whole, after))))
    extra = sorted(name for name in parameters.keys() - used if not name.endswith(".whitening"))
    if extra:
        raise InputError(f"The export has an array {extra[0]}, which this network has not; use the files it came with.")
    return nnx.from_flat_state(flat)


Take = Callable[[np.ndarray], np.ndarray]


class _Names:
    """Where the parameters of a checkpoint are in an export."""

    def __init__(self, m: ModelConfig):
        self.m = m

    def stacked(self, path: tuple) -> bool:
        """Say whether the parameter is that of several blocks, with a leading axis."""
        return path[0] == "blocks" or path[2:3] == ("rest",)

    def of(self, path: tuple) -> list[tuple[str, Take]]:
        """Return the names that a parameter has, and what part of it each is."""
        if path[0] == "blocks":
            return self._each("blocks", path[1:], self.m.layers, 0)
        if path[0] == "stages":
            stage, which, rest = f"stages.{path[1]}", path[2], path[3:]
            if which == "first":
                return [(_joined(stage, 0, *rest), lambda a: a)]
            return self._each(stage, rest, self.m.blocks[path[1]] - 1, 1)
        return [(_joined(*path), lambda a: a)]

    def _each(self, prefix: str, rest: tuple, count: int, first: int) -> list[tuple[str, Take]]:
        def part(k: int) -> Take:
            return lambda a: a[k]

        return [(_joined(prefix, k + first, *rest), part(k)) for k in range(count)]

    def trimmed(self, name: str, value: np.ndarray) -> np.ndarray:
        """Leave the ids out that only pad a table."""
        if self.m.task == "classify":
            return value
        if name == "embed.embedding":
            return value[: self.m.vocab + (self.m.task == "mlm")]
        return value[:, : self.m.vocab] if name == "head.kernel" else value


def _joined(*path: Any) -> str:
    return ".".join(map(str, path))


def _whitening(anchors: np.ndarray, m: ModelConfig) -> np.ndarray:
    """Return L⁻¹ (heads, n, n) of anchors (heads, n, width), in float32."""
    made = [features.anchored(jnp.asarray(a, jnp.float32), bias=m.yat_bias, epsilon=m.epsilon).inverse for a in anchors]
    return np.stack(jax.device_get(made))
