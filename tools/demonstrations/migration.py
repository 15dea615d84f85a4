"""Prototypes of a small ⵟ classifier move on to the data; a linear layer's weights move past it.

python -m tools.demonstrations.migration --out=docs/demonstrations/migration.png
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from aether.figures import INK, MUTED
from launch import cli
from tools.demonstrations.networks import Hidden
from tools.demonstrations.picture import COLORS, define, finish, panels, plane, rounded
from tools.demonstrations.points import clusters
from tools.demonstrations.training import fit, starts

PLACES, UNITS, POINTS, STARTS = 6, 12, 120, 50
RADII = (1.7, 3.0)
KINDS = {"ⵟ": "ⵟ prototypes", "linear": "weights of linear + ReLU"}

FLAGS = define(steps=2000)


def train(kind: str, x: np.ndarray, labels: np.ndarray, seed: int, steps: int, count: int) -> tuple[Any, ...]:
    """Train networks from `count` starts.

    Returns:
      Their kernels before each step and at the end, (count, steps + 1, 2, units), and their accuracies (count,).
    """
    graph, params = starts(lambda rngs: Hidden(kind, UNITS, PLACES, rngs=rngs), seed, count)
    logits = lambda params: nnx.merge(graph, params)(jnp.asarray(x))  # noqa: E731

    def loss(params: nnx.State) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params), labels).mean()

    def run(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        last, path = fit(loss, params, steps, optax.adam(0.02))
        right = jnp.mean(jnp.argmax(logits(last), -1) == labels)
        kernels = (path["hidden"]["kernel"][...], last["hidden"]["kernel"][...][None])
        return jnp.concatenate(kernels), right

    kernels, right = jax.jit(jax.vmap(run))(params)
    return np.asarray(kernels), np.asarray(right)


def nearest(kernels: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the mean distance of the columns of kernels (..., 2, units) to the nearest point of x (n, 2)."""
    apart = np.linalg.norm(kernels[..., None, :, :] - x[:, :, None], axis=-2)
    return apart.min(-2).mean(-1)


def draw(axis: Any, title: str, path: np.ndarray, x: np.ndarray, labels: np.ndarray) -> None:
    """Draw data and the paths (steps + 1, 2, units) of the units over training, from the ring to the star."""
    plane(axis, title, (-5.0, 5.0))
    axis.scatter(*x.T, s=9, color=MUTED, alpha=0.45, linewidth=0)
    axis.plot(*path.swapaxes(0, 1), color=COLORS[0], linewidth=1.6)
    axis.scatter(*path[0], s=26, facecolor="white", edgecolor=COLORS[0], zorder=3)
    axis.scatter(*path[-1], s=110, marker="*", color=COLORS[1], edgecolor=INK, linewidth=0.8, zorder=4)
    axis.plot(0, 0, marker="+", color=INK, markersize=9)


def main(values: flags.FlagValues) -> None:
    """Train both networks on clusters at two distances; draw the first start of each, measure all."""
    cli.require(values, "out", "docs/demonstrations/migration.png")
    figure, axes = panels("Where a hidden layer's vectors go in training", len(RADII), len(KINDS), 10.4)
    numbers: dict[str, Any] = dict(starts=STARTS)
    for row, radius in zip(axes, RADII, strict=True):
        x, labels = clusters(np.random.default_rng(values.seed), POINTS, PLACES, PLACES, radius)
        for axis, (kind, name) in zip(row, KINDS.items(), strict=True):
            kernels, right = train(kind, x, labels, values.seed, values.steps, STARTS)
            before, after = nearest(kernels[:, 0], x), nearest(kernels[:, -1], x)
            draw(axis, f"{name}, clusters at {radius:g}", kernels[0], x, labels)
            found = dict(before=before.mean(), after=after.mean(), nearer=np.sum(after < before))
            lengths = np.linalg.norm(kernels[:, [0, -1]], axis=2).mean((0, 2))
            found |= dict(lengths=lengths, accuracy=right.mean())
            numbers.setdefault(f"clusters at {radius:g}", {})[kind] = found
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
