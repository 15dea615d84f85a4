"""The forms of `python -m tools.bench --what=attention`: causal, one sequence, head width 64, by length."""

from collections.abc import Callable, Iterator
from typing import Any

from tools.bench_compare import Contender, nmn, of_function
from tools.bench_where import Where

WIDTH = 64


def tables(args: Any, where: Where) -> Iterator[tuple[str, list[Contender]]]:
    """Yield a table for each length."""
    for length, shape in shapes(args, where):
        title = f"attention: length {length}, {args.heads} heads x {WIDTH}, causal, {shape.dtype}"
        yield title, [*products(shape, where), *ours(shape), *theirs(shape)]


def shapes(args: Any, where: Where) -> Iterator[tuple[int, Any]]:
    """Yield each length with the shape (1, t, h, k) of queries, keys and values."""
    import jax

    dtype = args.dtype or ("float32" if where.on_cpu else "bfloat16")
    for length in args.lengths or ([512, 1024, 2048] if where.on_cpu else [512 * 2**i for i in range(8)]):
        yield length, jax.ShapeDtypeStruct((1, length, args.heads, WIDTH), dtype)


def products(shape: Any, where: Where) -> Iterator[Contender]:
    """Yield dot-product attention as JAX has it; on a GPU cuDNN's is the first, which takes 16 bits only."""
    import jax

    def by(implementation: str) -> Callable[..., Any]:
        return lambda _, q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    platform = where.device.platform
    if platform == "gpu" and shape.dtype != "float32":
        yield of_function("dot product, cuDNN", by("cudnn"), (), shape, shape, shape)
    yield of_function("dot product, XLA", by("xla"), (), shape, shape, shape)
    if platform == "tpu":
        yield of_function("dot product, splash", splash(shape), (), shape, shape, shape)


def splash(shape: Any) -> Callable[..., Any]:
    """Return JAX's splash attention for TPUs, with the block sizes that it chooses."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, heads, width = shape.shape
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)

    def run(_: Any, q: Any, k: Any, v: Any) -> Any:
        import jax

        q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    return run


def ours(shape: Any, scores: tuple[str, ...] = ("plain", "spherical", "dot")) -> Iterator[Contender]:
    """Yield our attention with each score and form."""
    import jax

    numbers = jax.ShapeDtypeStruct((shape.shape[2],), "float32")
    params = dict(bias=numbers, alpha=numbers, epsilon=numbers)
    for score in scores:
        for impl in ("plain", "blockwise", "auto"):
            name = f"{'dot product' if score == 'dot' else f'ⵟ {score}'}, Aether {impl}"
            yield of_function(name, attend(score, impl), () if score == "dot" else params, shape, shape, shape)


def attend(score: str, impl: str) -> Callable[..., Any]:
    """Return (b, α and ε a head, q, k, v) -> what they attend to."""
    from aether.kernels.attention import DotScore, YatScore, attention
    from aether.kernels.masks import Mask
    from aether.kernels.yat import unit

    def run(params: Any, q: Any, k: Any, v: Any) -> Any:
        spherical = score == "spherical"
        if spherical:
            q, k = unit(q), unit(k)
        how = DotScore() if score == "dot" else YatScore(**params, spherical=spherical, nonnegative_bias=True)
        return attention(q, k, v, how, mask=Mask(causal=True), impl=impl)

    return run


def theirs(shape: Any) -> Iterator[Contender]:
    """Yield nmn's attention."""
    if library := nmn():

        def run(_: Any, q: Any, k: Any, v: Any) -> Any:
            import jax.numpy as jnp

            t = q.shape[1]
            return library.yat_attention(q, k, v, mask=jnp.tril(jnp.ones((1, 1, t, t), bool)))

        yield of_function("ⵟ, nmn", run, (), shape, shape, shape)
