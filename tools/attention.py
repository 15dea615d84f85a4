"""Compare blockwise attention with the plain form: memory and time, forward and backward, one causal head of 64.

python -m tools.attention                    both tables
python -m tools.attention --what=memory      from the compiler's plan; nothing is run
python -m tools.attention --what=time        medians of interleaved pairs; more contenders: python -m tools.bench
"""

import statistics
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from absl import flags

from launch import cli
from tools.bench_compare import ratios, seconds

FLAGS = cli.new_flags()
flags.DEFINE_enum("what", "all", ["all", "memory", "time"], "what to measure", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 15, "interleaved pairs (time)", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_integer("heads", 1, "heads (time)", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_integer(
    "block", 0, "queries and keys in a block (0: as the layer chooses)", flag_values=FLAGS, lower_bound=0
)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of queries, keys and values", flag_values=FLAGS)

WIDTH = 64
SCORES = ("dot", "yat")
LENGTHS = (2048, 8192)  # of memory; times are of the first
IMPLS = ("plain", "blockwise")


def main(args: flags.FlagValues) -> None:
    """Print the tables asked for."""
    if args.what in ("all", "memory"):
        print_table(("score", "length", "plain MiB", "blockwise MiB", "plain / blockwise"), memory(args))
    if args.what in ("all", "time"):
        print_table(("score", "length", "plain ms", "blockwise ms", "blockwise / plain"), durations(args))


def memory(args: flags.FlagValues) -> Iterator[tuple[Any, ...]]:
    """Yield the scratch memory of both forms: what the pass needs beside its arguments and results."""
    for score in SCORES:
        for length in LENGTHS:
            sizes = [
                compiled(score, impl, length, 1, args).memory_analysis().temp_size_in_bytes / 2**20 for impl in IMPLS
            ]
            yield score, length, *sizes, sizes[0] / sizes[1]


def durations(args: flags.FlagValues) -> Iterator[tuple[Any, ...]]:
    """Yield the median times of both forms and the median of the pairs' ratios."""
    import jax

    length = LENGTHS[0]
    for score in SCORES:
        forms = [compiled(score, impl, length, args.heads, args) for impl in IMPLS]
        shape = (1, length, args.heads, WIDTH)
        arrays = [jax.random.normal(key, shape).astype(args.dtype) for key in jax.random.split(jax.random.key(0), 4)]
        pairs = [[seconds(partial(f, *arrays)) for f in forms] for _ in range(args.rounds + 1)][
            1:
        ]  # the first warms up
        medians = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
        yield score, length, *medians, ratios(pairs)[1]


def compiled(score: str, impl: str, length: int, heads: int, args: flags.FlagValues) -> Any:
    """Compile (q, k, v, g) -> the output, and for its cotangent g the gradients of q, k, v, b, α and ε."""
    import jax
    import jax.numpy as jnp

    from aether.kernels.attention import DotScore, YatScore, attention
    from aether.kernels.masks import Mask

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        ones = jnp.ones(heads)
        how = DotScore() if score == "dot" else YatScore(0.1 * ones, ones, 0.3 * ones, nonnegative_bias=True)

        def forward(q: jax.Array, k: jax.Array, v: jax.Array, how: Any) -> jax.Array:
            return attention(q, k, v, how, mask=Mask(causal=True), impl=impl, block=args.block or None)

        y, back = jax.vjp(forward, q, k, v, how)
        return y, back(g)

    shape = jax.ShapeDtypeStruct((1, length, heads, WIDTH), args.dtype)
    return jax.jit(run).lower(shape, shape, shape, shape).compile()


def print_table(head: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> None:
    """Print a Markdown table, each row as soon as it is measured."""
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
