"""AetherResNet and the ResNet baseline (He et al., 2016): one skeleton, two kinds of block.

AetherResNet has neither normalisation nor activations: its branches are ⵟ-convolution → linear convolution, and with
bottlenecks 1×1 → ⵟ 3×3 → 1×1. The baseline's are convolution → BatchNorm → ReLU.

Axes: b rows, h and w places, c channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from aether.config import ModelConfig
from aether.models.block import USUAL_STD, dropout, remat
from aether.nn import BatchNorm, Conv, Linear, YatConv2D, YatNMN
from aether.nn.param import stack
from aether.parallel import ROWS, constrain, fetched

_FAN_IN = 128  # at which `model.conv_bias` holds for spherical units
_PLAIN_STD = 0.25  # of plain prototypes; measured better than 0.5, 1 and 2 (LOG.md)
_LOOPED = 8  # blocks of a stage that are worth a loop: in one, XLA for CPUs is ten times slower (LOG.md)
_STEM_GAIN = 3.0  # differences of neighbouring pixels are a third as large as the pixels


def _unit(c: ModelConfig, fan_in: int) -> dict[str, Any]:
    """Return the options of a ⵟ unit, such that its output starts at order one whatever its fan-in.

    Of plain prototypes with entries from N(0, σ²) and a stream of variance 1, y ≈ α z² σ² / (1 + σ²) with z ~ N(0, 1);
    α makes that z² / 2. The cosine with a random direction is z / √fan_in; there α undoes the square, and b is as small
    as the cosine.
    """
    square = _PLAIN_STD**2
    alpha, bias = c.conv_alpha * (1 + square) / (2 * square), c.conv_bias
    if c.conv_spherical:
        alpha, bias = c.conv_alpha * fan_in / 2, bias * (_FAN_IN / fan_in) ** 0.5
    learned = dict(use_bias=bias > 0, softplus_bias=bias > 0, bias_init=bias, alpha_init=alpha)
    denominator = dict(epsilon=c.conv_epsilon, learnable_epsilon=True, spherical=c.conv_spherical)
    kernel = {} if c.conv_spherical else dict(kernel_init=jax.nn.initializers.normal(_PLAIN_STD))
    return dict(**learned, **denominator, **kernel)


def _stem_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw kernels from N(0, 1/fan_in) times a gain, each of zero sum over the places of a channel.

    Such kernels see edges. Brightness, which neighbouring places share, would make patches of the stream alike, and ⵟ
    units compare patches as wholes (LOG.md).
    """
    kernel = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")(key, shape, dtype)
    return _STEM_GAIN * (kernel - jnp.mean(kernel, (0, 1), keepdims=True))


def _projection(c: ModelConfig) -> dict[str, Any]:
    """Return the options of the last convolution of a branch: N(0, s²/fan_in), and kernels of zero sum, always.

    With s = 1/√(2 · blocks) all branches together add about half the stream's variance. Outputs of ⵟ units are positive
    and their mean is as large as what varies: let through, it would make all patches of the stream alike (LOG.md).
    """
    variance = 1 / (2 * sum(c.blocks))
    return dict(zero_sum=True, kernel_init=jax.nn.initializers.variance_scaling(variance, "fan_in", "normal"))


def _head(c: ModelConfig, width: int, rngs: nnx.Rngs) -> Linear | YatNMN:
    axes: Any = ("embed", None)
    if c.head == "linear":
        return Linear(width, c.classes, std=USUAL_STD, axes=axes, rngs=rngs)
    return YatNMN(width, c.classes, axes=axes, rngs=rngs, **_unit(c, width))


class YatBlock(nnx.Module):
    """skip(x) + out(ⵟ(reduce(x))); `reduce`, 1×1, with bottlenecks only, `skip`, 1×1, where the shape changes.

    `units` are the ⵟ units, `features` what `reduce` makes.
    """

    def __init__(self, c: ModelConfig, width: int, features: int, units: int, out: int, strides: int, rngs: nnx.Rngs):
        shared: dict[str, Any] = dict(dtype=c.dtype, rngs=rngs)
        inner, k = (features, 1) if c.bottleneck else (width, 3)
        self.reduce = Conv(width, features, (1, 1), use_bias=False, **shared) if c.bottleneck else None
        unit = _unit(c, 9 * inner)
        self.hidden = YatConv2D(inner, units, 3, strides, padding=1, **unit, **shared)
        self.out = Conv(units, out, (k, k), padding=k // 2, axes=("mlp", "embed"), **_projection(c), **shared)
        changes = strides > 1 or width != out
        self.skip = Conv(width, out, (1, 1), strides, use_bias=False, **shared) if changes else None

    def __call__(self, x: Array, train: bool) -> Array:
        """Map the stream (b, h, w, c), float32, to the next one."""
        h = x if self.reduce is None else checkpoint_name(self.reduce(x), "product")
        h = self.out(checkpoint_name(self.hidden(h), "hidden"))
        return (x if self.skip is None else self.skip(x)) + h.astype(jnp.float32)


class NormalizedConv(nnx.Module):
    """BatchNorm(conv(x)), with ReLU behind it if `relu`; kernels start at N(0, 2/fan_in) (He et al., 2015)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        strides: int = 1,
        *,
        relu: bool = True,
        scale_init: float = 1.0,
        axes: tuple[str | None, str] = ("embed", "mlp"),
        dtype: str,
        rngs: nnx.Rngs,
    ):
        he = jax.nn.initializers.he_normal()
        shared: dict[str, Any] = dict(padding=size // 2, use_bias=False, axes=axes, dtype=dtype, rngs=rngs)
        self.conv = Conv(inputs, outputs, (size, size), strides, kernel_init=he, **shared)
        self.norm = BatchNorm(outputs, scale_init=scale_init, axis=axes[1], dtype=dtype)
        self.relu = relu

    def __call__(self, x: Array, train: bool) -> Array:
        """Map (b, h, w, inputs) to (b, h', w', outputs)."""
        y = self.norm(checkpoint_name(self.conv(x), "product"), train)
        return jax.nn.relu(y) if self.relu else y


class Block(nnx.Module):
    """ReLU(skip(x) + branch(x)), all convolutions normalised; the last one's scale starts at 0 (Goyal et al., 2017)."""

    def __init__(self, c: ModelConfig, width: int, features: int, units: int, out: int, strides: int, rngs: nnx.Rngs):
        shared: dict[str, Any] = dict(dtype=c.dtype, rngs=rngs)
        last: dict[str, Any] = dict(relu=False, scale_init=0.0, axes=("mlp", "embed"))
        self.reduce = NormalizedConv(width, features, 1, **shared) if c.bottleneck else None
        self.hidden = NormalizedConv(features if c.bottleneck else width, units, 3, strides, **shared)
        self.out = NormalizedConv(units, out, 1 if c.bottleneck else 3, **last, **shared)
        changes = strides > 1 or width != out
        self.skip = NormalizedConv(width, out, 1, strides, relu=False, **shared) if changes else None

    def __call__(self, x: Array, train: bool) -> Array:
        """Map the stream (b, h, w, c), float32, to the next one."""
        h = x if self.reduce is None else self.reduce(x, train)
        h = self.out(self.hidden(h, train), train)
        return jax.nn.relu((x if self.skip is None else self.skip(x, train)) + h.astype(jnp.float32))


class Stage(nnx.Module):
    """Blocks of one width: the first, which may change the shape of the stream, and the others, stacked."""

    def __init__(self, c: ModelConfig, width: int, stage: int, rngs: nnx.Rngs):
        kind = Block if c.kind == "resnet" else YatBlock
        features, units, blocks, strides = c.width * 2**stage, c.units(stage), c.blocks[stage], 1 if stage == 0 else 2
        out = 4 * features if c.bottleneck else features
        self.first = kind(c, width, features, units, out, strides, rngs)
        self.rest = stack(lambda r: kind(c, out, features, units, out, 1, r), blocks - 1, rngs) if blocks > 1 else None
        self.config, self.length = c, blocks - 1

    def __call__(self, x: Array, train: bool) -> Array:
        """Map the stream (b, h, w, c), float32, to the next stage's."""
        looped = self.config.scan_layers and self.length >= _LOOPED
        x, statistics = self._runner(self.first, train, False)(x, nnx.state(self.first))
        nnx.update(self.first, statistics)
        if self.rest is None:
            return x
        run, states = self._runner(self.rest, train, looped), nnx.state(self.rest)
        if looped:
            x, statistics = jax.lax.scan(run, x, states)
        else:
            found = []
            for k in range(self.length):
                x, one = run(x, jax.tree.map(lambda v, k=k: v[k], states))
                found.append(one)
            statistics = jax.tree.map(lambda *each: jnp.stack(each), *found)
        nnx.update(self.rest, statistics)
        return x

    def _runner(self, blocks: nnx.Module, train: bool, looped: bool) -> Callable[..., tuple[Array, nnx.State]]:
        """Return run(x, state of one of the blocks) -> the next x, and what its statistics have become."""
        graph = nnx.graphdef(blocks)

        def run(x: Array, state: nnx.State) -> tuple[Array, nnx.State]:
            block = nnx.merge(graph, fetched(state))
            x = block(checkpoint_name(_laid_out(x), "stream"), train)
            return x, nnx.state(block, nnx.BatchStat)

        return remat(self.config, run, looped=looped)


def _laid_out(x: Array) -> Array:
    """Lay (b, h, w, c) out as the residual stream: rows over data and fsdp."""
    return constrain(x, ROWS, None, None, None)


class ResNet(nnx.Module):
    """A classifier of images: stem, stages of residual blocks, mean over the places, head.

    The residual stream is float32; what stem and branches compute is in `model.dtype`.

    Args:
      c: the resolved configuration.
      channels: of the images.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, channels: int, rngs: nnx.Rngs):
        self.config = c
        size, strides = {"imagenet": (7, 2), "cifar": (3, 1), "stride2": (3, 2)}[c.stem]
        axes = (None, "embed")
        shared: dict[str, Any] = dict(axes=axes, dtype=c.dtype, rngs=rngs)
        self.stem: Conv | NormalizedConv
        if c.kind == "resnet":
            self.stem = NormalizedConv(channels, c.width, size, strides, **shared)
        else:
            self.stem = Conv(
                channels, c.width, (size, size), strides, padding=size // 2, kernel_init=_stem_init, **shared
            )
        width, stages = c.width, []
        for k in range(len(c.blocks)):
            stages.append(Stage(c, width, k, rngs))
            width = c.width * 2**k * (4 if c.bottleneck else 1)
        self.stages = nnx.List(stages)
        self.head = _head(c, width, rngs)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Map images (b, h, w, channels) to float32 logits (b, classes).

        With a `key` this is training: BatchNorm takes the batch's statistics, and moves its own; dropout is on.
        """
        c, train = self.config, key is not None
        with jax.named_scope("stem"):
            x = self.stem(x, train) if isinstance(self.stem, NormalizedConv) else self.stem(x)
            if c.stem == "imagenet":  # before the cast: its gradient keeps what it sees
                x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
            x = x.astype(jnp.float32)
        for k, stage in enumerate(self.stages):
            with jax.named_scope(f"stage{k}"):
                x = stage(x, train)
        with jax.named_scope("head"):
            x = jnp.mean(_laid_out(x), (1, 2))
            return self.head(dropout(x, c.dropout, key)).astype(jnp.float32)
