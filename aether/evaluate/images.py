"""Scores of a classifier: loss, top-1, top-5, how well its confidence is calibrated, and which classes it confuses."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from aether.config import Config
from aether.losses import scaled
from aether.parallel import to_global

BINS = 15  # of equal width, over the confidence


def image_sums(config: Config) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """Return of_batch(model, batch) -> sums over the images whose mask is 1.

    The sums are `nll` (nats), `correct`, `top5`, `weight`; `bins` (3, BINS): how many images have that confidence, the
    largest probability, the sum of it, and how many of them are right; `confusion` (classes, classes): images of class
    i (row) taken for j.
    """
    mean, std = config.image.mean, config.image.std

    def of_batch(model: Any, batch: dict[str, Array]) -> dict[str, Array]:
        logits = model(scaled(batch["images"], mean, std))
        mask, labels = batch["mask"].astype(jnp.float32), batch["labels"]
        classes = logits.shape[-1]
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
        guess, confidence = jnp.argmax(logits, -1), jnp.exp(jnp.max(log_p, -1))
        right = (guess == labels).astype(jnp.float32)
        own = jnp.take_along_axis(logits, labels[:, None], 1)
        place = jnp.sum(logits > own, -1)  # of the label among the guesses
        which = jax.nn.one_hot(jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1), BINS) * mask[:, None]
        bins = jnp.stack([jnp.ones_like(right), confidence, right]) @ which
        confusion = jnp.einsum(
            "bi,bj->ij", jax.nn.one_hot(labels, classes) * mask[:, None], jax.nn.one_hot(guess, classes)
        )
        return dict(
            nll=jnp.sum(mask * nll),
            correct=jnp.sum(mask * right),
            top5=jnp.sum(mask * (place < 5)),
            weight=jnp.sum(mask),
            bins=bins,
            confusion=confusion,
        )

    return of_batch


@dataclass(frozen=True, order=True)
class Mistake:
    """An image that was taken for another class with this confidence."""

    confidence: float
    label: int
    guess: int
    image: np.ndarray = field(compare=False, repr=False)


class Guesses:
    """Looks at the images that a model classifies wrongly, and keeps those of which it is the surest.

    Attributes:
      worst: `keep` of them at most, the surest first.
    """

    def __init__(self, config: Config, graph: nnx.GraphDef, mesh: Mesh, keep: int = 36):
        mean, std, self._mesh, self._keep = config.image.mean, config.image.std, mesh, keep
        self.worst: list[Mistake] = []

        @jax.jit
        def guess(variables: Any, images: Array) -> tuple[Array, Array]:
            logits = nnx.merge(graph, variables)(scaled(images, mean, std))
            return jnp.argmax(logits, -1), jnp.max(jax.nn.softmax(logits), -1)

        self._guess = guess

    def watched(self, variables: Any, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Pass batches on, having looked at them."""
        for batch in batches:
            with jax.set_mesh(self._mesh):
                images = to_global({"images": batch["images"]}, self._mesh)["images"]
                guess, sure = jax.device_get(self._guess(variables, images))
            wrong = np.flatnonzero((guess != batch["labels"]) & (batch["mask"] > 0))
            found = [Mistake(float(sure[i]), int(batch["labels"][i]), int(guess[i]), batch["images"][i]) for i in wrong]
            self.worst = heapq.nlargest(self._keep, [*self.worst, *found])
            yield batch


def summarise_images(sums: dict[str, Any]) -> dict[str, float | int | None]:
    """Turn the sums of `image_sums` into what is reported.

    `loss` in nats an image; `accuracy` and `top5`, the share of images whose label is the first guess, or among the
    first five; `calibration_error` = Σ_bins n/N |accuracy − confidence| (Guo et al., 2017); `images`, how many.
    """
    total = float(sums.get("weight", 0.0))
    if not total:
        return dict(loss=0.0, accuracy=0.0, top5=0.0, calibration_error=0.0, images=0)
    _, confidence, right = sums["bins"]
    return dict(
        loss=float(sums["nll"]) / total,
        accuracy=float(sums["correct"]) / total,
        top5=float(sums["top5"]) / total,
        calibration_error=float(np.sum(np.abs(right - confidence))) / total,
        images=int(total),
    )
