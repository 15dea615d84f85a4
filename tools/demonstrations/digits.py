"""A classifier with one unit a class: prototypes of a ⵟ layer are digits, a linear layer's weights are differences.

python -m tools.demonstrations.digits --out=docs/demonstrations/digits.png
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from aether.config import build
from aether.data.corpus import open_corpus
from aether.data.examples import Examples
from aether.figures import INK
from aether.nn import Linear, YatNMN
from launch import cli
from tools.demonstrations.picture import define, finish, panels, rounded
from tools.demonstrations.training import fit, starts

EPSILON, STARTS, RATE = 1.0, 10, 0.01
ROWS = {
    "mean": "mean images",
    "linear": "linear weights",
    "yat": "ⵟ prototypes, from random starts",
    "yat_data": "ⵟ prototypes, each from an image of its class",
}

FLAGS = define(steps=1000)
flags.DEFINE_string("data", "digits", "images, as data.path takes them", FLAGS)


def load(path: str) -> tuple[np.ndarray, ...]:
    """Return images (n, side, side, channels) in 0..1 and classes to train on, and the same to test on."""
    corpus = open_corpus(build(dict(model=dict(kind="resnet"), data=dict(path=path, validation_fraction=0.2))))
    return (*_arrays(corpus.train[0].examples), *_arrays(corpus.validation["validation"]))


def _arrays(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    rows = [examples[i] for i in range(len(examples))]
    images = np.stack([row["images"] for row in rows]) / np.float32(255)
    return images, np.array([row["labels"] for row in rows])


def make(kind: str, x: np.ndarray, labels: np.ndarray, rngs: nnx.Rngs) -> nnx.Module:
    """Return the layer whose outputs are the logits; `yat_data` starts from a random image of each class."""
    classes = int(labels.max()) + 1
    if kind == "linear":
        return Linear(x.shape[1], classes, rngs=rngs)
    layer = YatNMN(x.shape[1], classes, epsilon=EPSILON, rngs=rngs)
    if kind == "yat_data":
        draws = jax.random.uniform(rngs.params(), (classes, len(x)))
        layer.set_prototypes(jnp.asarray(x)[jnp.argmax(jnp.where(labels == np.arange(classes)[:, None], draws, -1), 1)])
    return layer


def train(kind: str, data: tuple[np.ndarray, ...], seed: int, steps: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Train on all images at once; return kernels (count, width, classes) and test accuracies (count,)."""
    x, labels, test, answers = map(jnp.asarray, data)
    graph, params = starts(lambda rngs: make(kind, data[0], data[1], rngs), seed, count)

    def loss(params: nnx.State) -> jax.Array:
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def run(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        last, _ = fit(loss, params, steps, optax.adam(RATE), keep=False)
        right = jnp.mean(jnp.argmax(nnx.merge(graph, last)(test), -1) == answers)
        return last["kernel"][...], right

    kernels, right = jax.lax.map(jax.jit(run), params)
    return np.asarray(kernels), np.asarray(right)


def cosines(vectors: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the cosine of every column of vectors (d, k) with every row of points (n, d), (k, n)."""
    unit = vectors / np.linalg.norm(vectors, axis=0)
    return (points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12) @ unit).T


def likeness(kernels: np.ndarray, x: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Return how like their classes units (starts, d, classes) are, as means of |cosines|: a square knows no sign.

    With the mean image of the own class; with the nearest image of the own class; with the nearest of any other.
    """
    means = np.stack([x[labels == k].mean(0) for k in range(kernels.shape[-1])])
    own = np.arange(kernels.shape[-1])[:, None] == labels
    found = []
    for kernel in kernels:
        near = np.abs(cosines(kernel, x))
        best = [np.where(mask, near, 0).max(1).mean() for mask in (own, ~own)]
        found.append([np.abs(np.diag(cosines(kernel, means))).mean(), *best])
    first, second, third = np.mean(found, 0)
    return first, second, third


def side_by_side(vectors: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the columns of vectors (side² · channels, k) as grey pictures in a row, each in -1..1, gaps being NaN."""
    side = shape[0]
    pictures = vectors.T.reshape(-1, *shape).mean(-1)
    pictures = pictures / np.abs(pictures).max((1, 2), keepdims=True)
    gap = round(side / 4)
    row = np.full((side, len(pictures) * (side + gap) - gap), np.nan)
    for k, picture in enumerate(pictures):
        row[:, k * (side + gap) : k * (side + gap) + side] = picture
    return row


def main(values: flags.FlagValues) -> None:
    """Train both layers, draw the units of one start each, and measure how like images they are over all starts."""
    cli.require(values, "out", "docs/demonstrations/digits.png")
    images, labels, others, answers = load(values.data)
    x, test = (a.reshape(len(a), -1) for a in (images, others))
    data, classes = (x, labels, test, answers), int(labels.max()) + 1
    figure, axes = panels("One unit a class", len(ROWS), 1, 5.6)
    vectors = {"mean": np.stack([x[labels == k].mean(0) for k in range(classes)], -1)}
    numbers: dict[str, Any] = dict(images=len(x), test_images=len(test), starts=STARTS)
    for kind in list(ROWS)[1:]:
        kernels, right = train(kind, data, values.seed, values.steps, STARTS)
        vectors[kind] = kernels[0]
        mean, own, other = likeness(kernels, x, labels)
        numbers[kind] = dict(accuracy=right.mean(), cosine_with_mean=mean, with_nearest=own, with_nearest_other=other)
    for axis, (kind, name) in zip(axes[:, 0], ROWS.items(), strict=True):
        axis.set_title(name, fontsize=13, color=INK, loc="left", pad=6)
        axis.imshow(side_by_side(vectors[kind], images.shape[1:]), cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
