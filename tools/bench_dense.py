"""The dense block of `python -m tools.bench --what=dense`: ⵟ → Linear against LayerNorm → Linear → GELU → Linear."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tools.bench_compare import Contender, nmn, of_module
from tools.bench_where import Where

UNITS: dict[str, dict[str, Any]] = {
    "plain": dict(softplus_bias=True, bias_init=0.1),
    "spherical": dict(softplus_bias=True, bias_init=0.1, spherical=True, epsilon=0.3, learnable_epsilon=True),
}


def tables(args: Any, where: Where) -> Iterator[tuple[str, list[Contender]]]:
    """Yield the one table: rows × width → hidden → width, parameters in float32, no bias in a linear map."""
    small = where.on_cpu
    rows, width = args.rows or (1024 if small else 8192), args.width or (256 if small else 768)
    hidden, dtype = args.hidden or 4 * width, args.dtype or ("float32" if small else "bfloat16")
    yield (
        f"dense: {rows} x {width} -> {hidden} -> {width}, {dtype}",
        list(contenders(rows, width, hidden, dtype)),
    )


def contenders(rows: int, width: int, hidden: int, dtype: str) -> Iterator[Contender]:
    """Yield the usual block, the ⵟ ones, nmn's, and the block's matrix products alone."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from aether import nn

    x = jax.ShapeDtypeStruct((rows, width), dtype)
    r = nnx.Rngs(0)
    linear = partial(nn.Linear, use_bias=False, dtype=dtype, rngs=r)
    two = nnx.Sequential

    def usual() -> Any:
        norm = nn.LayerNorm(width, use_bias=False, dtype=dtype)
        return nnx.Sequential(norm, linear(width, hidden), jax.nn.gelu, linear(hidden, width))

    def keeping_dots(block: Any, x: Any) -> Any:
        graph, params = nnx.split(block)
        run = jax.checkpoint(lambda p, x: nnx.merge(graph, p)(x), policy=jax.checkpoint_policies.dots_saveable)
        return run(params, x)

    def pair(**options: Any) -> Any:
        return two(nn.YatNMN(width, hidden, dtype=dtype, rngs=r, **options), linear(hidden, width))

    yield of_module("LayerNorm, Linear, GELU, Linear", usual, x)
    yield of_module("the same, jax.checkpoint saves dots", usual, x, call=keeping_dots)
    for name, options in UNITS.items():
        yield of_module(f"YatNMN {name}, Linear", partial(pair, **options), x)
    if hasattr(nn, "YatMLP"):
        for name, options in UNITS.items():
            fused = partial(nn.YatMLP, width, hidden, out_bias=False, dtype=dtype, rngs=r, **options)
            yield of_module(f"YatMLP {name}", fused, x)
    if theirs := nmn():
        for name, fused in (("", False), (", fused", True)):
            layer = partial(theirs.YatNMN, width, hidden, fused=fused, dtype=jnp.dtype(dtype), rngs=r)
            yield of_module(f"nmn YatNMN{name}, Linear", lambda layer=layer: two(layer(), linear(hidden, width)), x)
    yield of_module("the six products alone", lambda: two(linear(width, hidden), linear(hidden, width)), x)
