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
    """Yield the one table: rows × width → hidden → width, parameters in float32."""
    small = where.on_cpu
    rows, width = args.rows or (1024 if small else 8192), args.width or (256 if small else 768)
    hidden, dtype = args.hidden or 4 * width, args.dtype or ("float32" if small else "bfloat16")
    biases = "" if args.biases else ", no biases in linear maps"
    title = f"dense: {rows} x {width} -> {hidden} -> {width}, {dtype}{biases}"
    yield title, list(contenders(rows, width, hidden, dtype, args.biases))


def contenders(rows: int, width: int, hidden: int, dtype: str, biases: bool) -> Iterator[Contender]:
    """Yield the usual block by flax, the ⵟ ones, nmn's, and the block's matrix products alone."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from aether import nn

    x = jax.ShapeDtypeStruct((rows, width), dtype)
    both: dict[str, Any] = dict(rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    flax = partial(nnx.Linear, use_bias=biases, **both)
    ours: dict[str, Any] = both | dict(dtype=dtype)

    def usual() -> Any:
        return nnx.Sequential(nnx.LayerNorm(width, **both), flax(width, hidden), jax.nn.gelu, flax(hidden, width))

    def keeping_dots(block: Any, x: Any) -> Any:
        graph, params = nnx.split(block)
        run = jax.checkpoint(lambda p, x: nnx.merge(graph, p)(x), policy=jax.checkpoint_policies.dots_saveable)
        return run(params, x)

    def pair(**options: Any) -> Any:
        unit = nn.YatNMN(width, hidden, **ours, **options)
        return nnx.Sequential(unit, nn.Linear(hidden, width, use_bias=biases, **ours))

    yield of_module("LayerNorm, Linear, GELU, Linear", usual, x)
    yield of_module("the same, jax.checkpoint saves dots", usual, x, call=keeping_dots)
    for name, options in UNITS.items():
        yield of_module(f"YatNMN {name}, Linear", partial(pair, **options), x)
        yield of_module(f"YatMLP {name}", partial(nn.YatMLP, width, hidden, out_bias=biases, **ours, **options), x)
    if theirs := nmn():
        for name, fused in (("", False), (" fused", True)):
            layer = partial(theirs.YatNMN, width, hidden, fused=fused, **both)
            yield of_module(f"nmn YatNMN{name}, Linear", lambda f=layer: nnx.Sequential(f(), flax(hidden, width)), x)
    products = partial(nnx.Linear, use_bias=False, **both)
    yield of_module(
        "the six products alone", lambda: nnx.Sequential(products(width, hidden), products(hidden, width)), x
    )
