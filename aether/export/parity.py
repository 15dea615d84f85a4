"""How near an export is to Aether: its logits, or its layers."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aether.errors import CheckError

BOUND = 1e-4  # largest difference of two logits
_ROWS = 32  # predictions compared at a time: float64 logits of a whole text are larger than its network
LAYER_BOUNDS = dict(formula=1e-6, aether=5e-6)  # relative, of float64 and of float32 numbers
Pairs = Iterable[tuple[np.ndarray, np.ndarray]]


class Verdict(Protocol):
    """What a comparison has found."""

    @property
    def holds(self) -> bool:
        """Whether the two are the same."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON takes it."""

    def verdict(self, target: str) -> str:
        """Say in one sentence how they differ."""

    def checked(self) -> tuple[str, list[tuple[str, str, str]]]:
        """Return for the card what was compared, and rows of what it is about, measured and allowed."""


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
        known = {k: _finite(v) for k, v in asdict(self).items()}
        return dict(verified=self.holds, **known)

    def verdict(self, target: str) -> str:
        """Say how the two differ."""
        return (
            f"The {target} export is not the network that Aether has: logits differ by up to "
            f"{self.max_logit_difference:.1e}, of {self.bound:.0e} allowed, and {self.top1_agreement:.2%} of the "
            f"likeliest guesses agree, of 100% asked for."
        )

    def checked(self) -> tuple[str, list[tuple[str, str, str]]]:
        """Return what was compared, and rows of what, measured, allowed."""
        what = (
            f"Aether and this export on the same {self.inputs} inputs ({self.predictions:,} predictions), both in "
            "float32 on a CPU (`parity.json`):"
        )
        return what, [
            ("largest difference of two logits", f"{self.max_logit_difference:.2e}", f"{self.bound:.0e}"),
            ("likeliest guesses that agree", f"{self.top1_agreement:.2%}", "100%"),
            ("largest KL divergence", f"{self.max_kl:.2e} nats", ""),
        ]


@dataclass(frozen=True)
class LayerParity:
    """Layers of two implementations on the same inputs.

    Attributes:
      inputs: sequences or images.
      differences: ‖a − b‖/‖b‖ by layer, framework and what is compared with it, a key of `LAYER_BOUNDS`.
      left_out: why a framework does not have a layer, by layer and framework.
    """

    inputs: int
    differences: dict[str, dict[str, dict[str, float]]]
    left_out: dict[str, dict[str, str]]

    @property
    def holds(self) -> bool:
        """Whether every difference is within its bound."""
        return all(self.largest(what) <= bound for what, bound in LAYER_BOUNDS.items())

    def largest(self, what: str) -> float:
        """Return the largest difference of a kind; NaN stays NaN."""
        return float(np.max([numbers[what] for layer in self.differences.values() for numbers in layer.values()]))

    def record(self) -> dict[str, Any]:
        """Return it as JSON takes it; numbers that are not finite become null."""
        layers = {
            name: {key: {k: _finite(v) for k, v in numbers.items()} for key, numbers in layer.items()}
            for name, layer in self.differences.items()
        }
        largest = {f"max_{what}_difference": _finite(self.largest(what)) for what in LAYER_BOUNDS}
        found: dict[str, Any] = dict(verified=self.holds, inputs=self.inputs, **largest, bounds=LAYER_BOUNDS)
        return found | dict(layers=layers, left_out=self.left_out)

    def verdict(self, target: str) -> str:
        """Say how the two differ."""
        parts = " and ".join(f"{self.largest(k):.1e} ({k}, of {v:.0e} allowed)" for k, v in LAYER_BOUNDS.items())
        return f"The layers of the {target} export are not those that Aether has: they differ by up to {parts}."

    def checked(self) -> tuple[str, list[tuple[str, str, str]]]:
        """Return what was compared, and rows of what, measured, allowed."""
        what = (
            f"Each layer here, in float64, on what it is given in Aether's pass through {self.inputs} real inputs "
            "(`parity.json`):"
        )
        rows = [
            (f"largest relative difference from {name}", f"{self.largest(key):.1e}", f"{LAYER_BOUNDS[key]:.0e}")
            for key, name in (("formula", "the formula in float64"), ("aether", "Aether's layer in float32"))
        ]
        rows += [
            (f"{name}, {framework}", "not compared", reason)
            for name, reasons in self.left_out.items()
            for framework, reason in reasons.items()
        ]
        return what, [("layers compared", str(len(self.differences)), ""), *rows]


def compare_logits(folder: Path, pairs: Pairs) -> Parity:
    """Compare batches of logits within `BOUND`, whatever the export."""
    return compare(pairs)


def compare(pairs: Pairs, bound: float = BOUND) -> Parity:
    """Compare batches of logits (b, ..., classes), Aether's first.

    Raises:
      CheckError: their shapes differ.
    """
    inputs = predictions = agreed = 0
    difference = divergence = 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise CheckError(f"Aether's logits are {ours.shape}, and those of the export {theirs.shape}.")
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


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
