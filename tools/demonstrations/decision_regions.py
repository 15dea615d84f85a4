"""What linear and ⵟ units can tell apart in the plane, with one unit a class and with four hidden ones.

python -m tools.demonstrations.decision_regions --out=docs/demonstrations/decision_regions.png
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from aether.figures import INK
from launch import cli
from tools.demonstrations.networks import Hidden, layer
from tools.demonstrations.picture import COLORS, define, finish, mesh, panels, plane, rounded, scatter
from tools.demonstrations.points import Data, clusters, moons, rings
from tools.demonstrations.training import fit, starts

TITLE = "Decision regions and accuracy, one unit a class or four hidden units"
LIMITS = (-3.0, 3.0)
STARTS = 20
TRAIN, TEST, SHOWN = 200, 2000, 150
DATA: dict[str, Callable[[np.random.Generator, int], Data]] = {
    "clusters": lambda rng, count: clusters(rng, count, 4, 4),
    "opposite clusters": lambda rng, count: clusters(rng, count, 6, 3),
    "two moons": moons,
    "rings": rings,
}
NETWORKS: dict[str, Callable[[int, nnx.Rngs], nnx.Module]] = {
    "linear": lambda classes, rngs: layer("linear", classes, rngs=rngs),
    "ⵟ": lambda classes, rngs: layer("ⵟ", classes, rngs=rngs),
    "4 ReLU, linear": lambda classes, rngs: Hidden("linear", 4, classes, rngs=rngs),
    "4 ⵟ, linear": lambda classes, rngs: Hidden("ⵟ", 4, classes, rngs=rngs),
}

FLAGS = define(steps=1000)


def train(network: str, data: str, seed: int, steps: int, count: int) -> tuple[list[nnx.Module], np.ndarray]:
    """Train from `count` starts; return the networks and their accuracies on fresh data."""
    rng = np.random.default_rng(seed)
    (x, labels), (fresh, answers) = DATA[data](rng, TRAIN), DATA[data](rng, TEST)
    graph, params = starts(lambda rngs: NETWORKS[network](int(labels.max()) + 1, rngs), seed, count)
    logits = lambda params, x: nnx.merge(graph, params)(jnp.asarray(x))  # noqa: E731

    def loss(params: nnx.State) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()

    def run(params: nnx.State) -> tuple[nnx.State, jax.Array]:
        params, _ = fit(loss, params, steps, optax.adam(0.05))
        return params, jnp.mean(jnp.argmax(logits(params, fresh), -1) == answers)

    params, accuracies = jax.jit(jax.vmap(run))(params)
    trained = [nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params)) for i in range(count)]
    return trained, np.asarray(accuracies)


def draw(axis: Any, title: str, network: nnx.Module, x: np.ndarray, labels: np.ndarray) -> None:
    """Draw the class of every point of the plane, and the data."""
    plane(axis, title, LIMITS)
    grid, classes = mesh(LIMITS), int(labels.max()) + 1
    region = np.argmax(network(jnp.asarray(grid)), -1)
    for label in range(classes):
        share = (region == label).astype(float)
        axis.contourf(grid[..., 0], grid[..., 1], share, [0.5, 1], colors=[COLORS[label]], alpha=0.25)
        axis.contour(grid[..., 0], grid[..., 1], share, [0.5], colors=INK, linewidths=0.8)
    scatter(axis, x, labels, size=12)


def main(values: flags.FlagValues) -> None:
    """Train all networks on all data sets; draw each one's median start."""
    cli.require(values, "out", "docs/demonstrations/decision_regions.png")
    figure, axes = panels(TITLE, len(NETWORKS), len(DATA), 2.8 * len(NETWORKS))
    numbers: dict[str, Any] = {}
    for column, data in enumerate(DATA):
        x, labels = DATA[data](np.random.default_rng(values.seed), TRAIN)
        for row, name in enumerate(NETWORKS):
            networks, accuracies = train(name, data, values.seed, values.steps, STARTS)
            median = np.argsort(accuracies)[len(accuracies) // 2]
            title = f"{name}: {100 * accuracies[median]:.1f} %"
            draw(
                axes[row, column],
                f"{data}\n{title}" if row == 0 else title,
                networks[median],
                x[:SHOWN],
                labels[:SHOWN],
            )
            span = dict(worst=accuracies.min(), median=accuracies[median], best=accuracies.max())
            numbers.setdefault(data, {})[name] = span
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
