"""The forms of `python -m tools.bench --what=linear`: linear ⵟ-attention against exact attention, by length."""

from collections.abc import Iterator
from typing import Any

from tools.bench_attention import WIDTH, ours, products, shapes
from tools.bench_compare import Contender, nmn, of_function
from tools.bench_where import Where

FEATURES = 321  # 1 + 64 and 256 anchors or products
NMN = dict(num_prf_features=16, num_anchor_features=20)  # 320 features


def tables(args: Any, where: Where) -> Iterator[tuple[str, list[Contender]]]:
    """Yield a table for each length; the features are made of unit vectors within the program."""
    for length, shape in shapes(args, where):
        title = f"linear attention: length {length}, {args.heads} heads x {WIDTH}, causal, {shape.dtype}"
        exact = [c for c in ours(shape, ("spherical",)) if not c.name.endswith("Aether plain")]
        yield title, [*products(shape, where), *exact, *linear(shape), *theirs(shape)]


def linear(shape: Any) -> Iterator[Contender]:
    """Yield `YatLinearAttention` without its linear maps: fitted anchors, whose gradient is made too, and Taylor's."""
    import jax
    from flax import nnx

    from aether.kernels.linear_attention import init_state, stream
    from aether.kernels.yat import unit
    from aether.nn import YatLinearAttention

    heads, dtype = shape.shape[2], str(shape.dtype)
    options: dict[str, Any] = dict(num_features=FEATURES, dtype=dtype, rngs=nnx.Rngs(0))
    for kind, name in (("anchored", "fitted"), ("taylor", "Taylor")):
        layer = YatLinearAttention(heads * WIDTH, heads, features=kind, **options)

        def run(anchors: Any, q: Any, k: Any, v: Any, layer: Any = layer) -> Any:
            if anchors:
                layer = nnx.merge(*nnx.split(layer))
                layer.anchors = nnx.Param(anchors[0])
            phi, floor = layer.feature_map()
            start = init_state(1, heads, FEATURES, WIDTH)
            return stream(phi, start, unit(q), unit(k), v, block=layer.block, chunk=layer.chunk, floor=floor)[0]

        anchors = () if layer.anchors is None else (jax.ShapeDtypeStruct(layer.anchors.shape, "float32"),)
        yield of_function(f"ⵟ linear, {name}, {FEATURES} features", run, anchors, shape, shape, shape)


def theirs(shape: Any) -> Iterator[Contender]:
    """Yield nmn's linear attention with about as many features."""
    import jax

    if library := nmn():
        projection = library.create_yat_tp_projection(jax.random.key(0), WIDTH, **NMN)

        def run(_: Any, q: Any, k: Any, v: Any) -> Any:
            return library.yat_tp_attention(q, k, v, projection, causal=True)

        yield of_function("ⵟ linear, nmn, 320 features", run, (), shape, shape, shape)
