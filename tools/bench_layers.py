"""The layers of `python -m tools.bench --what=layers`: each ⵟ layer beside the usual layer that it stands in for."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

Layer = tuple[Any, Callable[[Any, Any], Any], tuple[int, ...]]  # a module, its call, and the shape of its input


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield for each pair what one costs in units of the other, forward and backward.

    `flops` are the compiler's count; `kept` are the bytes that the backward pass needs beside the parameters and the
    input; `time` is the median of interleaved pairs.
    """
    for name, ours, theirs in pairs():
        costs = [cost(*ours), cost(*theirs)]
        times = [[seconds(run) for _, _, run in costs] for _ in range(rounds + 1)][1:]  # the first warms up
        yield dict(
            layer=name[0],
            against=name[1],
            flops=costs[0][0] / costs[1][0],
            kept=costs[0][1] / costs[1][1],
            kept_kib=[round(c[1] / 1024) for c in costs],
            time=statistics.median(a / b for a, b in times),
            ms=[round(1e3 * statistics.median(column), 2) for column in zip(*times, strict=True)],
        )


def cost(layer: Any, call: Callable[[Any, Any], Any], shape: tuple[int, ...]) -> tuple[float, int, Callable[[], Any]]:
    """Return the operations, the bytes kept for the backward pass, and a function that runs both passes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), shape)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return call(nnx.merge(graph, params), x)

    def both(params: Any, x: jax.Array) -> Any:
        y, back = jax.vjp(forward, params, x)
        return back(jnp.ones_like(y))

    def kept(params: Any, x: jax.Array) -> Any:
        given = {id(leaf) for leaf in jax.tree.leaves((params, x))}
        residuals = {id(r): r for r in jax.tree.leaves(jax.vjp(forward, params, x)[1]) if hasattr(r, "nbytes")}
        return [r for i, r in residuals.items() if i not in given]

    compiled = jax.jit(both).lower(params, x).compile()
    analysis: Any = compiled.cost_analysis()
    size = sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(jax.eval_shape(kept, params, x)))
    return analysis["flops"], size, lambda: compiled(params, x)


def seconds(run: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


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
