"""What `python -m tools.bench --what=lazy` measures: a ⵟ-MLP evaluated at its k nearest prototypes, error and time."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from aether.errors import InputError
from tools.bench_compare import ratios, sample, say, seconds

SHARES = (1.0, 0.25, 0.1, 0.02, 0.01, 0.005)
PROBES = 8


def rows(inputs: int, width: int, hidden: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each k: errors, bounds, and the times of the whole layer by that of the dense one.

    The prototypes are inputs of the same distribution, a mixture of as many clusters as √hidden, so that near ones are
    what a trained layer has; the linear map is drawn. `error` and `bound` are those of the exact search, relative to
    the output; `exact` and `cells` times of the layer by the exact search and, where faiss is installed, by cells, over
    that of the dense layer, medians over interleaved rounds; `found` is the share of the k nearest that cells find.
    """
    import jax
    import numpy as np

    from aether.explain.lazy import Cells, LazyMLP, errors, nearest, readout

    mlp, x = drawn(inputs, width, hidden)
    counts = sorted({max(1, round(share * hidden)) for share in SHARES}, reverse=True)
    measured = errors(mlp, x, counts)
    try:
        cells = Cells(mlp.hidden, probes=PROBES)
    except InputError as error:
        say(f"no cells: {error}")
        cells = None
    out = mlp.out.kernel[...]
    last = jax.jit(readout)

    def by_cells(k: int) -> Callable[[], Any]:
        return lambda: last(cells.nearest(x, k)._replace(cell=None), out)

    for row in measured:
        k = int(row["k"])
        calls = [compiled(mlp, x), compiled(LazyMLP(mlp, k), x), *([by_cells(k)] if cells else [])]
        times = timed(calls, rounds)
        found: dict[str, Any] = dict(exact=times[1])
        if cells:
            pairs = zip(*(np.asarray(n.chosen) for n in (cells.nearest(x, k), nearest(mlp.hidden, x, k))), strict=True)
            found |= dict(cells=times[2], found=float(np.mean([len({*a} & {*b}) / k for a, b in pairs])))
        yield dict(what="lazy", rows=inputs, width=width, hidden=hidden) | row | found


def drawn(inputs: int, width: int, hidden: int) -> tuple[Any, Any]:
    """Return the layer and its inputs: means from N(0, 1), points around them from N(0, 1/4)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from aether.nn import YatMLP

    first, second, third = jax.random.split(jax.random.key(0), 3)
    means = jax.random.normal(first, (round(hidden**0.5), width))
    cluster = jax.random.randint(second, (inputs + hidden,), 0, len(means))
    points = means[cluster] + 0.5 * jax.random.normal(third, (inputs + hidden, width))
    mlp = YatMLP(width, hidden, softplus_bias=True, bias_init=0.1, epsilon=0.3, rngs=nnx.Rngs(0))
    mlp.hidden.set_prototypes(points[inputs:])
    return mlp, jnp.asarray(points[:inputs])


def compiled(module: Any, x: Any) -> Callable[[], Any]:
    """Return a call of the compiled module."""
    import jax
    from flax import nnx

    graph, state = nnx.split(module)
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
    return lambda: program(state, x)


def timed(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return each call's time by that of the first one, the median over interleaved rounds."""
    for call in calls:
        seconds(call)  # the first call of a program is none of its times
    lengths = [seconds(call) for call in calls]

    def rested(call: Callable[[], Any], length: float) -> float:
        time.sleep(0.1)  # the threads of faiss wait busily for a while after a search
        return sample(call, length)

    return ratios([[rested(call, n) for call, n in zip(calls, lengths, strict=True)] for _ in range(rounds)])
