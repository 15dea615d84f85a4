"""The layers of `python -m tools.bench --what=conv`: ⵟ-convolution against Conv → BatchNorm → ReLU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tools.bench_compare import Contender, nmn, of_module
from tools.bench_where import Where

STAGES = ((32, 64), (16, 128), (8, 256), (4, 512))  # sides and channels of ResNet-18 on CIFAR's 32 x 32 images


def tables(args: Any, where: Where) -> Iterator[tuple[str, list[Contender]]]:
    """Yield a table for each stage: 3 x 3, stride 1, as many channels out as in."""
    batch = args.batch or (32 if where.on_cpu else 256)
    dtype = args.dtype or ("float32" if where.on_cpu else "bfloat16")
    for side, channels in STAGES:
        title = f"conv: {batch} x {side} x {side} x {channels}, 3 x 3, {dtype}"
        yield title, list(contenders(batch, side, channels, dtype))


def contenders(batch: int, side: int, channels: int, dtype: str) -> Iterator[Contender]:
    """Yield the usual layer, whose statistics are those of the batch, the ⵟ ones, and nmn's."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from aether import nn

    x = jax.ShapeDtypeStruct((batch, side, side, channels), dtype)
    r, kind = nnx.Rngs(0), jnp.dtype(dtype)

    def usual() -> Any:
        conv = nnx.Conv(channels, channels, (3, 3), use_bias=False, dtype=kind, rngs=r)
        return nnx.Sequential(conv, nnx.BatchNorm(channels, use_running_average=False, dtype=kind, rngs=r), jax.nn.relu)

    yield of_module("Conv, BatchNorm, ReLU", usual, x)
    for name, spherical in (("plain", False), ("spherical", True)):
        options: dict[str, Any] = dict(softplus_bias=True, bias_init=0.1, epsilon=0.1, spherical=spherical)
        layer = partial(nn.YatConv2D, channels, channels, 3, dtype=dtype, rngs=r, **options)
        yield of_module(f"YatConv2D {name}", layer, x)
    if theirs := nmn():
        yield of_module("nmn YatConv2D", partial(theirs.YatConv2D, channels, channels, (3, 3), dtype=kind, rngs=r), x)
