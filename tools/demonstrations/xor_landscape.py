"""The loss of one unit on XOR over its two weights, and where gradient descent goes on it.

python -m tools.demonstrations.xor_landscape --out=docs/demonstrations/xor_landscape.png
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array

from aether.figures import INK
from aether.kernels.yat import yat
from launch import cli
from tools.demonstrations.picture import COLORS, define, finish, mesh, panels, plane, rounded
from tools.demonstrations.training import fit
from tools.demonstrations.xor import LABELS, POINTS

LIMITS = (-3.0, 3.0)
ALPHA, EPSILON = 10.0, 1.0
RATE, STARTS, PATHS = 0.02, 1000, 8
UNITS: dict[str, Callable[[Array], Array]] = {
    "sigmoid(x·w)": lambda w: jax.nn.sigmoid(POINTS @ w),
    "ReLU(x·w)": lambda w: jax.nn.relu(POINTS @ w),
    "10 (x·w)²/(‖x − w‖² + 1)": lambda w: yat(
        jnp.asarray(POINTS), w[:, None], alpha=ALPHA, epsilon=EPSILON, distance="exact"
    )[:, 0],
}

FLAGS = define(steps=5000)


def loss(unit: Callable[[Array], Array], w: Array) -> Array:
    """Return the mean squared error of a unit's four responses to 0, 0, 1, 1."""
    return jnp.mean((unit(w) - LABELS) ** 2)


def descend(unit: Callable[[Array], Array], w: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Descend from each of w (n, 2); return the paths (n, steps + 1, 2) and how many points are right at their ends.

    A response above ½ means "one of the two". Gradients longer than 1 are shortened to that: ⵟ's slopes are steep.
    """

    def run(w: Array) -> tuple[Array, Array]:
        last, path = fit(
            lambda w: loss(unit, w), w, steps, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE))
        )
        return jnp.concatenate([path, last[None]]), jnp.sum((unit(last) > 0.5) == LABELS)

    paths, right = jax.jit(jax.vmap(run))(jnp.asarray(w))
    return np.asarray(paths), np.asarray(right)


def minima(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the points of a grid (n, n, 2) whose value is the lowest of all, to 1e-6."""
    return x[values <= values.min() + 1e-6]


def draw(axis: Any, title: str, values: np.ndarray, paths: np.ndarray, best: np.ndarray) -> None:
    """Draw a loss over the weights, its minima in orange, and paths from rings to dots."""
    plane(axis, title, LIMITS, (-2.0, 0.0, 2.0))
    x = mesh(LIMITS, len(values))
    levels = np.geomspace(0.01, 40, 25)
    axis.contourf(x[..., 0], x[..., 1], np.log(values), np.log(levels), cmap="cividis", extend="both")
    axis.contour(
        x[..., 0], x[..., 1], np.log(values), np.log(levels), colors="white", linewidths=0.4, linestyles="solid"
    )
    for path in paths:
        axis.plot(*path.T, color="white", linewidth=3)
        axis.plot(*path.T, color=COLORS[3], linewidth=1.8)
    axis.scatter(*paths[:, 0].T, s=30, facecolor="white", edgecolor=INK, zorder=3)
    axis.scatter(*paths[:, -1].T, s=30, color=COLORS[3], edgecolor=INK, zorder=4)
    few = dict(s=230, marker="*", edgecolor=INK) if len(best) <= 2 else dict(s=12)
    axis.scatter(*best.T, color=COLORS[1], zorder=5, **few)
    axis.set_xlabel("w₁", fontsize=12, color=INK)


def main(values: flags.FlagValues) -> None:
    """Draw three landscapes with the same starts; count where the descents end."""
    cli.require(values, "out", "docs/demonstrations/xor_landscape.png")
    figure, axes = panels("The loss of one unit on XOR over its weights, b = 0", 1, len(UNITS), 3.95)
    begin = np.random.default_rng(values.seed).uniform(*LIMITS, size=(STARTS, 2)).astype(np.float32)
    grid, numbers = mesh(LIMITS, 301), dict[str, Any](starts=STARTS)
    for axis, (name, unit) in zip(axes[0], UNITS.items(), strict=True):
        heights = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda w, unit=unit: loss(unit, w))))(jnp.asarray(grid)))
        paths, right = descend(unit, begin, values.steps)
        ends = np.asarray(jax.vmap(lambda w, unit=unit: loss(unit, w))(jnp.asarray(paths[:, -1])))
        best = minima(heights, grid)
        draw(axis, name, heights, paths[:PATHS], best)
        found = dict(lowest=heights.min(), places=len(best), first=best[0], last=best[-1])
        found |= dict(right=np.bincount(right, minlength=5))
        numbers[name] = found | dict(ends=np.percentile(ends, [0, 50, 100]))
    axes[0, 0].set_ylabel("w₂", fontsize=12, color=INK)
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
