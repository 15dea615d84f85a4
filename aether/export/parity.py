"""How near the logits of an export are to Aether's."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BOUND = 1e-4  # largest difference of two logits
_ROWS = 32  # predictions compared at a time: float64 logits of a whole text are larger than its network


@dataclass(frozen=True)
class Parity:
    """Logits of two implementations on the same inputs.

    Attributes:
      inputs: sequences or images.
      predictions: positions, or images.
      max_logit_difference: over all of them, absolute.
      max_kl: the largest Kullback–Leibler divergence of one prediction, Aether's from the other, in nats.
      top1_agreement: share of predictions with the same likeliest class or id.
      bound: what `max_logit_difference` may be.
    """

    inputs: int
    predictions: int
    max_logit_difference: float
    max_kl: float
    top1_agreement: float
    bound: float = BOUND

    @property
    def holds(self) -> bool:
        """Whether the two are the same network: differences within the bound, and every likeliest id the same."""
        return self.max_logit_difference <= self.bound and self.top1_agreement == 1.0

    def record(self) -> dict[str, Any]:
        """Return it as JSON takes it; numbers that are not finite become null."""
        known = {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}
        return dict(verified=self.holds, **known)


def compare(pairs: Iterable[tuple[np.ndarray, np.ndarray]], bound: float = BOUND) -> Parity:
    """Compare batches of logits (b, ..., classes), Aether's first.

    Raises:
      ValueError: their shapes differ.
    """
    inputs = predictions = agreed = 0
    difference = divergence = 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(f"Aether's logits are {ours.shape}, and those of the export {theirs.shape}.")
        inputs += len(ours)
        flat = [x.reshape(-1, x.shape[-1]) for x in (ours, theirs)]
        for start in range(0, len(flat[0]), _ROWS):
            a, b = (x[start : start + _ROWS].astype(np.float64) for x in flat)
            predictions += len(a)
            difference = float(np.maximum(difference, np.max(np.abs(a - b))))  # NaN stays NaN
            p, q = _log_softmax(a), _log_softmax(b)
            divergence = float(np.maximum(divergence, np.max(np.sum(np.exp(p) * (p - q), -1))))
            agreed += int(np.sum(np.argmax(a, -1) == np.argmax(b, -1)))
    return Parity(inputs, predictions, difference, divergence, agreed / max(predictions, 1), bound)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
