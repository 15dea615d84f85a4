"""Measure linear attention by the spherical ⵟ-kernel against the exact means, and its time by length.

python -m tools.linear_attention --what=features   data-independent features against SLAY's, by b, ε and clustering
python -m tools.linear_attention --what=fitted     anchors fitted on other data, b = 1, ε = 0.1
python -m tools.linear_attention --what=time       time per token of the causal form, 2 k to 64 k tokens

A score is the cosine of the approximate and the exact outputs Σκv/Σκ as whole arrays, in float64: head width 64,
length 1024, v ~ N(0, 1), queries and keys uniform on the sphere ("random") or in 16 clusters with the within-cluster
cosine named.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_enum("what", "features", ["features", "fitted", "time"], "what to measure", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 4, "draws of data and features a row", flag_values=FLAGS, lower_bound=2)
flags.DEFINE_integer("num_features", 1024, "of each map (features)", flag_values=FLAGS, lower_bound=128)
flags.DEFINE_integer("rounds", 5, "interleaved rounds (time)", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_string("json", "", "file to write the rows to", flag_values=FLAGS)

WIDTH, LENGTH, CLUSTERS = 64, 1024, 16
COSINES = (0.0, 0.5, 0.7, 0.9)
LENGTHS = tuple(1024 * 2**i for i in range(1, 7))
SLAYS = ((1, 16), (1, 32), (1, 64), (2, 32))  # nodes and anchors; the best of them in each row is the baseline
RARE = 0.01  # probability of the tail
Row = dict[str, Any]


def main(args: flags.FlagValues) -> None:
    """Measure one thing, print its table, and write its rows as JSON if asked to."""
    measure: dict[str, Callable[[Any], Iterator[Row]]] = dict(features=features, fitted=fitted, time=times)
    rows: list[Row] = []
    for row in measure[args.what](args):
        if not rows:
            print("".join(f"{name:>18}" for name in row))
        rows.append(row)
        print("".join(f"{_cell(value):>18}" for value in row.values()), flush=True)
    if args.what == "time":
        cost = [row["µs a token"] for row in rows]
        print(f"longest / shortest: {cost[-1] / cost[0]:.3f}; largest / smallest: {max(cost) / min(cost):.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def features(args: flags.FlagValues) -> Iterator[Row]:
    """Yield a row for each b, ε and clustering: mean and standard error of the scores.

    "taylor" is the expectation over its rare tail: (1 − p)·(a draw without) + p·(a draw with it), each measured. "cut"
    is without a tail (biased), "waves" has no rare draw: half of its features are the tail in every draw.
    """
    import jax

    from aether.kernels.features import slay, taylor

    m = args.num_features
    most = 2 + WIDTH + WIDTH * (WIDTH + 1) // 2
    for bias, epsilon in ((b, e) for b in (1.0, 0.1) for e in (0.1, 0.3, 1.0)):
        kernel = dict(bias=bias, epsilon=epsilon)
        for cosine in COSINES:
            scores: dict[str, list[float]] = {}
            for seed in range(args.seeds):
                key = jax.random.key(1000 + seed)
                judge = Judge(np.random.default_rng(seed), cosine, **kernel)
                maps = {f"slay {n}x{a}": slay(key, WIDTH, m, nodes=n, anchors=a, **kernel) for n, a in SLAYS}
                drawn = taylor(key, WIDTH, min(m, most), tail_probability=RARE, **kernel)
                maps["cut"] = dataclasses.replace(drawn, strength=np.float32(0))
                maps["hit"] = dataclasses.replace(drawn, strength=np.float32(RARE**-0.5))
                maps["waves"] = taylor(key, WIDTH, m, tail_probability=1.0, tail_features=m // 2, **kernel)
                for name, score in dict(uniform=judge.uniform(), **{n: judge(f) for n, f in maps.items()}).items():
                    scores.setdefault(name, []).append(score)
            print(f"b = {bias}, ε = {epsilon}, within {cosine}", file=sys.stderr, flush=True)
            yield dict(b=bias, ε=epsilon, within=cosine or "random", **_columns(scores))


def _columns(scores: dict[str, list[float]]) -> Row:
    best = max((name for name in scores if name.startswith("slay")), key=lambda name: statistics.mean(scores[name]))
    tail = [(1 - RARE) * cut + RARE * hit for cut, hit in zip(scores["cut"], scores["hit"], strict=True)]
    named = dict(uniform=scores["uniform"], slay=scores[best], taylor=tail, cut=scores["cut"], waves=scores["waves"])
    row: Row = {name: _summary(values) for name, values in named.items()}
    return row | {"slay nodes x anchors": best.split()[1]}


def fitted(args: flags.FlagValues) -> Iterator[Row]:
    """Yield a row for each clustering and number of features; "strangers" are anchors fitted on other clusters."""
    import jax

    from aether.kernels.features import anchored, fit_anchors

    fit = jax.jit(fit_anchors, static_argnames=("num_anchors",))
    kernel = dict(bias=1.0, epsilon=0.1)
    for cosine in COSINES:
        for m in (321, 1024, 4096):
            scores: dict[str, list[float]] = dict(uniform=[], fitted=[], strangers=[])
            for seed in range(args.seeds):
                rng = np.random.default_rng(seed)
                judge = Judge(rng, cosine, **kernel)
                scores["uniform"].append(judge.uniform())
                strange = draw(rng, CLUSTERS, WIDTH)
                for name, centres in dict(fitted=judge.centres, strangers=strange).items():
                    others = clustered(rng, centres, cosine, 8192)
                    anchors = fit(jax.random.key(seed), others.astype(np.float32), num_anchors=m - 1 - WIDTH)
                    scores[name].append(judge(anchored(anchors, **kernel)))
            print(f"{m} features, within {cosine}", file=sys.stderr, flush=True)
            yield dict(within=cosine or "random", features=m, **{k: _summary(v) for k, v in scores.items()})


def times(args: flags.FlagValues) -> Iterator[Row]:
    """Yield the median time per token at each length: features and causal sums, one head, 512 of `Taylor`."""
    import jax
    import jax.numpy as jnp

    from aether.kernels.features import taylor
    from aether.kernels.linear_attention import init_state, stream

    phi = taylor(jax.random.key(0), WIDTH, 512, bias=1.0, epsilon=0.1)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return stream(phi, init_state(1, 1, 512, WIDTH), q, k, v, floor=phi.floor)[0]

    rng = np.random.default_rng(0)
    inputs = {n: [jnp.asarray(draw(rng, n, WIDTH)[None, :, None], jnp.float32) for _ in range(3)] for n in LENGTHS}
    seconds: dict[int, list[float]] = {n: [] for n in LENGTHS}
    for i in range(args.rounds + 1):
        for n in LENGTHS:
            repeats = max(LENGTHS) // n if i else 1
            begin = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(attend(*inputs[n]))
            if i:  # the first round compiles
                seconds[n].append((time.perf_counter() - begin) / (repeats * n))
        print(f"round {i} of {args.rounds}", file=sys.stderr, flush=True)
    for n in LENGTHS:
        yield {"tokens": n, "µs a token": 1e6 * statistics.median(seconds[n])}


class Judge:
    """Queries, keys and values, and the exact outputs for them."""

    def __init__(self, rng: np.random.Generator, cosine: float, bias: float, epsilon: float):
        self.centres = draw(rng, CLUSTERS, WIDTH)
        self.q, self.k = (clustered(rng, self.centres, cosine, LENGTH) for _ in range(2))
        self.v = rng.normal(size=(LENGTH, WIDTH))
        s = self.q @ self.k.T
        self.exact = self.means((s + bias) ** 2 / (2 + epsilon - 2 * s), 0.0)

    def __call__(self, phi: Any) -> float:
        """Return the score of a feature map, its features in float32."""
        import jax

        q, k = (np.asarray(_mapped()(phi, x.astype(np.float32)), np.float64) for x in (self.q, self.k))
        return _cosine(self.means(q @ k.T, jax.device_get(phi.floor)), self.exact)

    def uniform(self) -> float:
        """Return the score of equal weights."""
        return _cosine(self.means(np.ones((LENGTH, LENGTH)), 0.0), self.exact)

    def means(self, weights: np.ndarray, floor: float) -> np.ndarray:
        """Return Σwv/Σw with the divisor kept above `floor` times the number of keys, as the kernel does."""
        return weights @ self.v / np.maximum(weights.sum(1, keepdims=True), floor * LENGTH)


def draw(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Return n vectors, uniform on the unit sphere."""
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clustered(rng: np.random.Generator, centres: np.ndarray, cosine: float, n: int) -> np.ndarray:
    """Return n unit vectors about random ones of `centres`, two of a cluster having `cosine` on average."""
    x = cosine**0.5 * centres[rng.integers(0, len(centres), n)]
    x = x + ((1 - cosine) / centres.shape[1]) ** 0.5 * rng.normal(size=x.shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _mapped() -> Any:
    """Return the jitted call of a map, its arrays traced: one compilation for all draws of a map."""
    import jax

    return jax.jit(_call)


def _call(phi: Any, x: Any) -> Any:
    return phi(x)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def _summary(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
