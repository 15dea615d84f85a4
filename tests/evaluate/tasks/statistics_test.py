"""Estimates against NumPy, and standard errors against what they mean: the spread over samples drawn again."""

import math

import numpy as np
import pytest

from aether.evaluate.tasks.statistics import Estimate, exponential, mean, over, ratio


def test_mean_and_its_standard_error(rng):
    x = rng.normal(size=37)
    m = mean(x.tolist())
    assert m.value == pytest.approx(x.mean()) and m.stderr == pytest.approx(x.std(ddof=1) / math.sqrt(37))
    assert mean([3.0]) == (3.0, None)


def test_ratios_and_perplexities_spread_as_they_say(rng):
    def draw():
        weights = rng.integers(5, 50, 60)
        return (rng.normal(2.0, 0.7, 60) * weights).tolist(), weights.tolist()

    drawn = [ratio(*draw()) for _ in range(2000)]
    spread = np.std([r.value for r in drawn])
    assert np.mean([r.stderr for r in drawn]) == pytest.approx(spread, rel=0.1)
    powers = [exponential(r) for r in drawn]
    assert np.mean([p.stderr for p in powers]) == pytest.approx(np.std([p.value for p in powers]), rel=0.1)
    totals, weights = draw()
    assert ratio(totals, weights).value == pytest.approx(sum(totals) / sum(weights))
    assert ratio(totals, [1] * 60).stderr == pytest.approx(mean(totals).stderr)


def test_one_observation_and_too_large_numbers():
    assert ratio([4.0], [2]) == (2.0, None) and exponential(Estimate(0.0, None)) == (1.0, None)
    assert exponential(Estimate(800.0, 1.0)) == (math.inf, math.inf)
    assert math.isnan(exponential(Estimate(math.nan, None)).value)
    assert over(Estimate(3.0, 1.0), -2.0) == (-1.5, 0.5) and over(Estimate(3.0, None), 2.0) == (1.5, None)
