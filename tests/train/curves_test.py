"""The picture: any run can be drawn, smoothing and thinning keep what matters."""

import io

import numpy as np
import pytest
from PIL import Image

from aether.train import curves
from aether.train.curves import draw, short
from aether.train.metrics import Curve


@pytest.mark.parametrize("losses", [[2.0], [None] * 5, [3.0, None, 2.0], list(np.linspace(9, 1, 20_000))])
def test_any_curve_can_be_drawn(losses):
    curve = Curve()
    for step, loss in enumerate(losses, 1):
        curve.add({"step": step, "loss": loss, "learning_rate": 1e-3})
    with Image.open(io.BytesIO(draw({"train": curve, "$\\x$": curve}, "ⵟ 名 $\\x$", 32))) as image:
        assert image.size == (1600, 1000)


def test_smoothing_keeps_the_ends_and_the_mean():
    line = np.linspace(5, 1, 300)
    smooth = curves._smooth(line)
    assert smooth[0] == 5 and np.allclose(smooth[:290], line[:290]) and abs(smooth[-1] - 1) < 0.1
    noisy = line + np.random.default_rng(0).normal(size=300)
    assert np.abs(curves._smooth(noisy)[20:] - line[20:]).mean() < 0.35 * np.abs(noisy - line)[20:].mean()


def test_thinning_keeps_the_extremes():
    x, y = np.arange(100_000), np.zeros(100_000)
    y[77_777], y[5] = 9, -9
    thin_x, thin_y = curves._envelope(x, y)
    assert len(thin_x) == len(thin_y) == 3000 and thin_y.max() == 9 and thin_y.min() == -9
    assert abs(thin_x[thin_y.argmax()] - 77_777) < 100


def test_short_counts():
    assert [short(n) for n in (0, 950, 1000, 12_345, 999_999, 1_240_000, 2.5e9)] == [
        "0", "950", "1k", "12.3k", "1000k", "1.24M", "2.5B",
    ]  # fmt: skip
