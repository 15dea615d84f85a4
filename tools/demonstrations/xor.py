"""One ⵟ unit solves XOR, which no linear unit does.

python -m tools.demonstrations.xor --out=docs/demonstrations/xor.png
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from aether.figures import INK
from aether.nn import YatNMN
from launch import cli
from tools.demonstrations.picture import define, finish, mesh, panels, plane, rounded, scatter
from tools.demonstrations.training import fit, starts

POINTS = np.array([[0, 0], [1, 1], [0, 1], [1, 0]], np.float32)
LABELS = np.array([0, 0, 1, 1])
THRESHOLD = 1.0  # a response above it means "one of the two"
STARTS = 1000
LIMITS = (-0.75, 1.75)

FLAGS = define(steps=1000)


def make(rngs: nnx.Rngs) -> YatNMN:
    """Return the unit α (x·w + b)²/(‖x − w‖² + 1); w, b and α are learned."""
    return YatNMN(2, 1, epsilon=1.0, rngs=rngs)


def closed_form() -> YatNMN:
    """Return the unit with w = (1, −1), b = 0, α = 12: its responses are 0, 0, 2 and 6 exactly."""
    unit = make(nnx.Rngs(0))
    unit.kernel[...] = jnp.array([[1.0], [-1.0]])
    unit.bias[...] = jnp.zeros(1)
    unit.alpha[...] = jnp.full(1, 12.0)
    return unit


def train(seed: int, steps: int, count: int) -> tuple[nnx.GraphDef, nnx.State, np.ndarray]:
    """Train from `count` random starts; return the graph, the parameters and the responses (count, 4)."""
    graph, params = starts(make, seed, count)
    response = lambda params: nnx.merge(graph, params)(jnp.asarray(POINTS))[:, 0]  # noqa: E731

    def loss(params: nnx.State) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(response(params) - THRESHOLD, LABELS).mean()

    params, _ = jax.jit(jax.vmap(lambda p: fit(loss, p, steps, optax.adam(0.05))))(params)
    return graph, params, np.asarray(jax.vmap(response)(params))


def points_right(responses: np.ndarray) -> np.ndarray:
    """Return how many of the points are on the right side of the threshold: (..., 4) -> (...)."""
    return np.sum((responses > THRESHOLD) == LABELS, -1)


def best_half_plane(directions: int = 720) -> tuple[int, np.ndarray, float]:
    """Return (points right, w, threshold) of the best x·w > threshold, the widest gap first among equals.

    Only the order of the points along w matters, and it changes at multiples of 45° alone: no other line does better.
    """
    best, order = (0, np.zeros(2), 0.0), (0, 0.0)
    for angle in np.arange(directions) * 2 * np.pi / directions:
        w = np.array([np.cos(angle), np.sin(angle)])
        along = np.sort(POINTS @ w)
        for low, high in zip(along[:-1], along[1:], strict=True):
            right = int(np.sum((POINTS @ w > (low + high) / 2) == LABELS))
            if (right, high - low) > order:
                best, order = (right, w, (low + high) / 2), (right, high - low)
    return best


def draw(axis: Any, title: str, logit: np.ndarray, responses: np.ndarray) -> None:
    """Draw the probability 1/(1 + exp(−logit)) over the plane, the line where it is ½, the points and responses."""
    plane(axis, title, LIMITS, (0.0, 1.0))
    x = mesh(LIMITS)
    axis.contourf(x[..., 0], x[..., 1], 1 / (1 + np.exp(-logit)), np.linspace(0, 1, 21), cmap="PuOr_r", alpha=0.6)
    axis.contour(x[..., 0], x[..., 1], logit, [0], colors=INK, linewidths=2)
    scatter(axis, POINTS, LABELS, size=170)
    for point, response in zip(POINTS, responses, strict=True):
        axis.annotate(f"{response:.1f}", point, (10, 8), textcoords="offset points", fontsize=13, color=INK)


def main(values: flags.FlagValues) -> None:
    """Draw the closed form, a trained unit and the best linear unit."""
    cli.require(values, "out", "docs/demonstrations/xor.png")
    graph, params, responses = train(values.seed, values.steps, STARTS)
    right = points_right(responses)
    trained = nnx.merge(graph, jax.tree.map(lambda p: p[np.argmax(right)], params))
    linear, w, threshold = best_half_plane()
    figure, axes = panels("XOR with one unit, and its response to each point", 1, 3, 3.95)
    units = {"ⵟ, w = (1, −1), b = 0: 4 of 4": closed_form(), f"ⵟ, trained: {right.max()} of 4": trained}
    answers = [np.asarray(unit(POINTS))[:, 0] for unit in units.values()]
    x = mesh(LIMITS)
    for axis, (title, unit), answer in zip(axes[0], units.items(), answers, strict=False):
        draw(axis, title, np.asarray(unit(x))[..., 0] - THRESHOLD, answer)
    draw(axes[0, 2], f"linear, the best: {linear} of 4", 6 * (x @ w - threshold), POINTS @ w)
    numbers = dict(closed_form=answers[0], linear_best=linear, starts=len(right), solved=np.sum(right == 4))
    if (stuck := responses[right < 4]).size:
        numbers |= dict(responses_of_the_others=[stuck.min(), stuck.max()])
    numbers |= dict(right=np.bincount(right, minlength=5), responses=answers[1], w=trained.kernel[...][:, 0])
    numbers |= dict(b=trained.bias[...][0], alpha=trained.alpha[...][0])
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
