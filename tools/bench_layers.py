"""The layers of `python -m tools.bench --what=layers`: each ⵟ layer beside the usual layer that it stands in for."""

from collections.abc import Callable, Iterator
from typing import Any

from tools.bench_compare import measured, of_module
from tools.bench_where import Where

Layer = tuple[Any, Callable[[Any, Any], Any], tuple[int, ...]]  # a module, its call, and the shape of its input


def rows(where: Where, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield for each pair what one costs in units of the other, forward and backward.

    `flops` are the compiler's count; `kept` are the bytes that the backward pass needs beside the parameters and the
    input; `time` is the median of interleaved pairs.
    """
    import jax

    for names, *layers in pairs():
        contenders = [
            of_module(name, lambda layer=layer: layer, jax.ShapeDtypeStruct(shape, "float32"), call=call)
            for name, (layer, call, shape) in zip(names, layers, strict=True)
        ]
        theirs, ours = measured(names[0], contenders[::-1], where, rounds)
        yield dict(
            layer=names[0],
            against=names[1],
            flops=ours["compiler_flops"] / theirs["compiler_flops"],
            kept=ours["beside_bytes"] / theirs["beside_bytes"],
            kept_kib=[round(row["beside_bytes"] / 1024) for row in (ours, theirs)],
            time=ours["ratio"],
            ms=[round(row["ms"], 2) for row in (ours, theirs)],
        )


def pairs() -> Iterator[tuple[tuple[str, str], Layer, Layer]]:
    """Yield the names and layers that are compared: same widths, same input, b ≥ 0 where there is one."""
    import jax
    from flax import nnx

    from aether import nn

    def plain(layer: Any, x: Any) -> Any:
        return layer(x)

    def then(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda layer, x: f(layer(x))

    def attend(layer: Any, x: Any) -> Any:
        return layer(x, is_causal=True)[0]

    r, unit = nnx.Rngs(0), dict(softplus_bias=True, bias_init=0.1, epsilon=0.1, rngs=nnx.Rngs(0))
    image, tokens, sequence = (4, 16, 16, 64), (2048, 256), (1, 1024, 256)
    dense = nn.Linear(256, 1024, std=0.1, rngs=r)
    yield (
        ("YatNMN", "Linear, GELU"),
        (nn.YatNMN(256, 1024, **unit), plain, tokens),
        (dense, then(jax.nn.gelu), tokens),
    )
    conv, back = nnx.Conv(64, 64, (3, 3), rngs=r), nnx.ConvTranspose(64, 64, (3, 3), strides=(2, 2), rngs=r)
    ours, ours_back = nn.YatConv2D(64, 64, 3, **unit), nn.YatConvTranspose2D(64, 64, 3, strides=2, **unit)
    yield ("YatConv2D", "nnx.Conv, ReLU"), (ours, plain, image), (conv, then(jax.nn.relu), image)
    yield ("YatConvTranspose2D", "nnx.ConvTranspose, ReLU"), (ours_back, plain, image), (back, then(jax.nn.relu), image)
    table = nn.YatEmbed(4096, 256, epsilon=0.1, rngs=r)
    logits = lambda layer, q: q @ layer.embedding[...].T  # noqa: E731
    yield ("YatEmbed.attend", "q·Eᵀ"), (table, lambda m, q: m.attend(q), tokens), (table, logits, tokens)
    for impl in ("plain", "blockwise"):
        ours = nn.YatAttention(256, 4, spherical=True, impl=impl, **unit)
        theirs = nn.Attention(256, 4, impl=impl, rngs=r)
        yield (f"YatAttention, {impl}", f"Attention, {impl}"), (ours, attend, sequence), (theirs, attend, sequence)
    linear, theirs = nn.YatLinearAttention(256, 4, num_features=321, rngs=r), nn.Attention(256, 4, rngs=r)
    long = (1, 4096, 256)
    yield ("YatLinearAttention, 4096", "Attention, 4096"), (linear, attend, long), (theirs, attend, long)
    cells = [
        (nn.YatSimpleCell, nnx.SimpleCell),
        (nn.YatGRUCell, nnx.GRUCell),
        (nn.YatLSTMCell, nnx.OptimizedLSTMCell),
    ]
    for cell, usual in cells:
        a, b = (nnx.RNN(kind(128, 128, rngs=nnx.Rngs(0))) for kind in (cell, usual))
        yield (cell.__name__, f"nnx.{usual.__name__}"), (a, plain, (8, 64, 128)), (b, plain, (8, 64, 128))
