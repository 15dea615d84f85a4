"""The forms of `python -m tools.bench --what=linear`: linear ⵟ-attention against exact attention, by length."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tools.bench_attention import WIDTH, ours, products, shapes
from tools.bench_compare import Contender, Program, compiled, nmn
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
    for kind, name in (("anchored", "fitted"), ("taylor", "Taylor")):
        make = partial(layer, kind, shape)
        yield Contender(
            f"ⵟ linear, {name}, {FEATURES} features",
            lambda where, make=make: compiled(*make(), [shape] * 3, where),
        )


def layer(kind: str, shape: Any) -> tuple[Callable[..., Any], Any]:
    """Return (anchors, q, k, v) -> what the layer of these features attends to, and the shapes of the anchors."""
    import jax
    from flax import nnx

    from aether.kernels.linear_attention import init_state, stream
    from aether.kernels.yat import unit
    from aether.nn import YatLinearAttention

    heads, dtype = shape.shape[2], str(shape.dtype)
    made = YatLinearAttention(
        heads * WIDTH, heads, features=kind, num_features=FEATURES, dtype=dtype, rngs=nnx.Rngs(0)
    )  # fmt: skip

    drawn = None if made.anchors is not None else made.feature_map()  # here, not where a TPU that is absent is the mesh

    def run(anchors: Any, q: Any, k: Any, v: Any) -> Any:
        own = nnx.clone(made)
        if anchors:
            own.anchors = nnx.Param(anchors[0])
        phi, floor = drawn or own.feature_map()
        start = init_state(1, heads, FEATURES, WIDTH)
        return stream(phi, start, unit(q), unit(k), v, block=own.block, chunk=own.chunk, floor=floor)[0]

    return run, () if made.anchors is None else (jax.ShapeDtypeStruct(made.anchors.shape, "float32"),)


def theirs(shape: Any) -> Iterator[Contender]:
    """Yield nmn's linear attention with about as many features."""
    library = nmn()

    def make(where: Where) -> Program:
        import jax

        projection = library.create_yat_tp_projection(jax.random.key(0), WIDTH, **NMN)

        def run(_: Any, q: Any, k: Any, v: Any) -> Any:
            return library.yat_tp_attention(q, k, v, projection, causal=True)

        return compiled(run, (), [shape] * 3, where)

    if library:
        yield Contender("ⵟ linear, nmn, 320 features", make)
