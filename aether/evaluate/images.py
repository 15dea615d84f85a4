"""Scores of a classifier: loss, top-1, top-5, how well its confidence is calibrated, and which classes it confuses."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aether.config import Config
from aether.losses import scaled

BINS = 15  # of equal width, over the confidence


def image_sums(config: Config, rows: bool = False) -> Callable[[Any, dict[str, Array]], dict[str, Any]]:
    """Return of_batch(model, batch) -> sums over the images whose mask is 1.

    The sums are `nll` (nats), `correct`, `top5`, `weight`; `bins` (3, BINS): how many images have that confidence, the
    largest probability, the sum of it, and how many of them are right. With `rows` also `confusion` (classes, classes):
    images of class i (row) taken for j; and `rows`, of each image, which are no sums: `guess`, `confidence` (b,).

    Of equal logits the first counts as the largest. An image with a logit of NaN or infinity is taken for nothing: its
    guess is -1, its confidence 0.
    """
    mean, std = config.image.mean, config.image.std

    def of_batch(model: Any, batch: dict[str, Array]) -> dict[str, Any]:
        logits = model(scaled(batch["images"], mean, std))
        mask, labels = batch["mask"].astype(jnp.float32), batch["labels"]
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
        sure = jnp.max(log_p, -1)
        known = jnp.isfinite(sure)
        guess = jnp.where(known, jnp.argmax(logits, -1), -1)
        confidence = jnp.where(known, jnp.exp(sure), 0.0)
        right = (guess == labels).astype(jnp.float32)
        which = jax.nn.one_hot(jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1), BINS) * mask[:, None]
        kinds = jnp.stack([jnp.ones_like(right), confidence, right])
        found: dict[str, Any] = dict(
            nll=jnp.sum(mask * nll),
            correct=jnp.sum(mask * right),
            top5=jnp.sum(mask * (known & (_place(logits, labels) < 5))),
            weight=jnp.sum(mask),
            bins=jnp.matmul(kinds, which, precision="highest"),
        )
        if rows:
            taken = jax.nn.one_hot(labels, logits.shape[-1]) * mask[:, None]
            found["confusion"] = jnp.einsum("bi,bj->ij", taken, jax.nn.one_hot(guess, logits.shape[-1]))
            found["rows"] = dict(guess=guess, confidence=confidence)
        return found

    return of_batch


def _place(logits: Array, labels: Array) -> Array:
    """Return how many classes are guessed before the label: those with larger logits, and equal ones before it."""
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    return jnp.sum((logits > own) | ((logits == own) & before), -1)


@dataclass(frozen=True, order=True)
class Mistake:
    """An image that was taken for another class (-1: for none) with this confidence."""

    confidence: float
    label: int
    guess: int
    image: np.ndarray = field(compare=False, repr=False)


class Mistakes:
    """Looks at batches and at the `rows` of `image_sums`, and keeps the images that are classified wrongly.

    Attributes:
      worst: `keep` of them at most, those with the surest guesses, the surest first.
    """

    def __init__(self, keep: int = 36):
        self.keep = keep
        self.worst: list[Mistake] = []

    def __call__(self, batch: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> None:
        """Look at one batch."""
        guess, sure, labels, images = rows["guess"], rows["confidence"], batch["labels"], batch["images"]
        wrong = np.flatnonzero((guess != labels) & (batch["mask"] > 0))
        wrong = wrong[np.argsort(-sure[wrong], kind="stable")][: self.keep]
        # copies, as a view would keep its whole batch
        found = [Mistake(float(sure[i]), int(labels[i]), int(guess[i]), images[i].copy()) for i in wrong]
        self.worst = heapq.nlargest(self.keep, [*self.worst, *found])


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
