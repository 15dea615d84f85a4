"""Means and perplexities with their standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A number and its standard error; None where one observation gives none."""

    value: float
    stderr: float | None


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean m and the sample's standard deviation / √n, √(Σ(x − m)² / (n − 1)) / √n."""
    n = len(values)
    m = sum(values) / n
    if n < 2:
        return Estimate(m, None)
    return Estimate(m, math.sqrt(sum((x - m) ** 2 for x in values) / (n - 1)) / math.sqrt(n))


def ratio(totals: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Return r = Σx / Σw and its standard error, √(n/(n − 1) · Σ(x − r w)²) / Σw: the units are drawn, not their parts.

    Source: Cochran, Sampling Techniques (1977), 2.11; the delta method for a ratio of means.
    """
    n, weight = len(totals), sum(weights)
    r = sum(totals) / weight
    if n < 2:
        return Estimate(r, None)
    spread = sum((x - r * w) ** 2 for x, w in zip(totals, weights, strict=True))
    return Estimate(r, math.sqrt(n / (n - 1) * spread) / weight)


def exponential(e: Estimate) -> Estimate:
    """Return eˣ and, by the delta method, eˣ times the standard error of x; infinity where it is too large."""
    try:
        value = math.exp(e.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, None if e.stderr is None else value * e.stderr)


def over(e: Estimate, divisor: float) -> Estimate:
    """Return e / divisor."""
    return Estimate(e.value / divisor, None if e.stderr is None else e.stderr / abs(divisor))
