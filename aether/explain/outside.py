"""How far an input of a network is from its data: scores, what they are worth, and when to abstain.

Three kinds of scores, all larger for what is further outside:

- of the answer, of any network: `confidence`, minus the largest probability (Hendrycks and Gimpel, 2017), `energy`,
  −log Σ exp(logits) (Liu et al., 2020), and of causal texts `nll`; of texts they are means over positions;
- of what is inside any network: `units` and `stream`, how unlike the usual ones the outputs of hidden units, and of
  residual blocks, are, means over places (Mahalanobis distance; Lee et al., 2018, without classes);
- of ⵟ layers with prototypes: `distance` ‖x − w‖² to the nearest centre, `relative` ‖x − w‖²/(‖x‖² + ‖w‖²) to the
  nearest in that sense, `response` and `total`, minus the largest and the sum of |y| over the units, all of them means
  over places; and `profile`, how unlike the usual ones the distances to all centres are: the Mahalanobis distance of
  the vector of log(‖x − w_j‖² + ε), a mean over places.

Of each but the first kind there is one score a layer, `profile:stages.0.1.hidden`, and one of all layers, `profile`:
the mean of the layers' scores for `profile`, `units` and `stream`, of their z-scores for the others. What is usual is
learned from inputs that are neither tested nor choose a threshold.

The nearest centre alone says little: a distance grows with ‖x‖, so that what is darker or smoother than the data is
nearer than they are. `profile` does not have that failing; it was chosen on one run of images. Windows of a text differ
so much that it tells less of them than `nll`, the network's own density (LOG.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aether.errors import InputError
from aether.explain.detection import Usual, auroc, calibration_error, threshold
from aether.explain.nearness import NEAR, VECTORS, Measured, measuring

Scores = dict[str, np.ndarray]


class Detector:
    """Scores how far inputs of a network are from what it was made with, as `Scores` by name, (n,) each.

    Args:
      model: any network of `aether.models`; one without ⵟ prototypes has the scores that do not need them.
      usual: inputs from which it learns what is usual, ids (n, t) or normalised images (n, s, s, c). A profile takes
        n/4 units of a layer at most.

    Attributes:
      best: the score to take: of causal texts `nll`, of others `profile`, or `stream` without ⵟ prototypes.
    """

    def __init__(self, model: Any, usual: np.ndarray):
        self.measure = measuring(model)
        m = self.measure(usual)
        self._usual = {name: {k: Usual.of(a) for k, a in getattr(m, name).items()} for name in VECTORS}
        self._moments = {k: {s: (a.mean(), a.std()) for s, a in part.items()} for k, part in m.near.items()}
        self.best = "nll" if m.sure.nll is not None else "profile" if m.profile else "stream"

    def __call__(self, x: np.ndarray) -> Scores:
        """Return the scores of inputs (n, ...)."""
        return self.scores(self.measure(x))

    def scores(self, m: Measured) -> Scores:
        """Return the scores of what has been measured."""
        answer = dict(confidence=-m.sure.confidence, energy=m.sure.energy, nll=m.sure.nll)
        found = {name: a.astype(np.float64) for name, a in answer.items() if a is not None}
        for name, learned in self._usual.items():
            rows = getattr(m, name)
            found |= _with_mean(name, {layer: usual.unlike(rows[layer]) for layer, usual in learned.items()})
        for name in NEAR if self._moments else ():
            found |= _with_mean(name, {layer: self._standard(layer, name, part) for layer, part in m.near.items()})
        return found

    def _standard(self, layer: str, name: str, part: Mapping[str, np.ndarray]) -> np.ndarray:
        mean, deviation = (float(number) for number in self._moments[layer][name])
        return (part[name].astype(np.float64) - mean) / max(deviation, 1e-30)


def _with_mean(name: str, layers: Scores) -> Scores:
    """Return the mean over layers, and the layers' own."""
    if not layers:
        return {}
    return {name: np.mean(list(layers.values()), 0)} | {f"{name}:{layer}": a for layer, a in layers.items()}


def abstaining(
    detector: Detector, inside: np.ndarray, kept: float = 0.95, by: str = ""
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of inputs (n, ...): which of them to abstain on, (n,) booleans.

    Args:
      detector: which has not learned from `inside`.
      inside: inputs of the network's kind, of which the share `kept` is to be answered.
      kept: that share.
      by: the score; `detector.best` by default.

    Raises:
      InputError: there is no such score, or no input.
    """
    scores, by = detector(inside), by or detector.best
    if by not in scores:
        raise InputError(f"by is {by!r}; the scores are {', '.join(scores)}.")
    most = threshold(scores[by], kept)
    return lambda x: detector(x)[by] > most


@dataclass(frozen=True)
class Told:
    """How well a network's scores tell inputs of its own kind from others.

    Attributes:
      best: the score to look at first, see `Detector`.
      scores: of the inputs inside that were tested, by score.
      outside: set -> score -> (m,).
      auroc: set -> score -> P(outside above inside) + ½ P(equal).
      thresholds: score -> chosen on inputs inside that are not tested, so that a share of them is kept.
      refused: set -> score -> the share above the threshold; under "" that of the inputs inside.
      accuracy: share of right guesses inside, of texts over all positions; None of images without labels.
      accuracy_kept: score -> the same over those that are not refused, None if all are.
      calibration_error: of all guesses inside, 15 bins; None of images without labels.
    """

    best: str
    scores: Scores = field(repr=False)
    outside: dict[str, Scores] = field(repr=False)
    auroc: dict[str, dict[str, float]]
    thresholds: dict[str, float]
    refused: dict[str, dict[str, float]]
    accuracy: float | None
    accuracy_kept: dict[str, float | None]
    calibration_error: float | None


def tell(
    model: Any,
    inside: np.ndarray,
    outsides: Mapping[str, np.ndarray],
    labels: np.ndarray | None = None,
    *,
    usual: np.ndarray | None = None,
    kept: float = 0.95,
) -> Told:
    """Tell inputs of a network's kind from others by every score.

    Args:
      model: any network of `aether.models`.
      inside: ids (n, t) or normalised images (n, s, s, c) that it was not trained on.
      outsides: others by name, in the same form.
      labels: (n,) of images; of causal texts they are the ids.
      usual: inputs to learn from what is usual, its training data; by default a third of `inside`. Of the rest every
        second one chooses the thresholds, the others are tested.
      kept: the share of the inside inputs to be answered.

    Raises:
      InputError: there are too few inputs, other labels than inputs, or inputs of different shapes.
    """
    inside = np.asarray(inside)
    parts = 2 if usual is not None else 3
    if len(inside) < parts:
        raise InputError(f"There are {len(inside)} inputs inside; give {parts} at least, better hundreds.")
    if labels is not None and len(labels) != len(inside):
        raise InputError(f"There are {len(inside)} inputs inside and {len(labels)} labels; give a label each, or none.")
    for name, x in outsides.items():
        if x.shape[1:] != inside.shape[1:]:
            raise InputError(
                f"{name} has inputs {x.shape[1:]} and those inside are {inside.shape[1:]}; resize or cut them."
            )
    choosing, tested = (np.arange(len(inside))[k::parts] for k in (parts - 2, parts - 1))
    detector = Detector(model, inside[::parts] if usual is None else usual)
    most = {name: threshold(a, kept) for name, a in detector(inside[choosing]).items()}
    measured = detector.measure(inside[tested])
    scores = detector.scores(measured)
    outside = {name: detector(x) for name, x in outsides.items()}
    right, confidence = _guesses(measured, inside[tested], None if labels is None else np.asarray(labels)[tested])
    return Told(
        best=detector.best,
        scores=scores,
        outside=outside,
        auroc={name: {key: auroc(scores[key], a) for key, a in part.items()} for name, part in outside.items()},
        thresholds=most,
        refused={
            name: {key: float(np.mean(a > most[key])) for key, a in part.items()}
            for name, part in {"": scores, **outside}.items()
        },
        accuracy=None if right is None else float(right.mean()),
        accuracy_kept={key: _mean(right, a <= most[key]) for key, a in scores.items()},
        calibration_error=None if right is None else calibration_error(confidence, right),
    )


def _guesses(m: Measured, x: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray]:
    """Return which guesses are right, (n, places), and how sure each is; None where nothing says what is right."""
    if m.sure.nll is not None:
        return m.sure.guess == x[:, 1:], m.sure.each
    return None if labels is None else m.sure.guess == labels[:, None], m.sure.each


def _mean(right: np.ndarray | None, rows: np.ndarray) -> float | None:
    return None if right is None or not rows.any() else float(right[rows].mean())
