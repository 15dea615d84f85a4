"""`curves.png`: the losses and the learning rate of a run in one picture."""

import itertools
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from aether.figures import INK, MUTED, new_figure, png
from aether.train.metrics import Curve

CURVES = "curves.png"
GRID = "#e4e7eb"
TRAIN = "#2f6fde"
SETS = ("#e4572e", "#17a673", "#9b51e0", "#d49a00", "#c2185b")


def draw(curves: Mapping[str, Curve], title: str, per_step: int = 0, unit: str = "tokens") -> bytes:
    """Return a PNG (1600 x 1000): losses above, learning rate below, over steps, what was seen on top if known."""
    figure = new_figure(10, 6.25, dpi=160)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    style(upper)
    style(lower)
    _draw_losses(upper, curves)
    steps, rate = _envelope(*_finite(curves["train"].steps, curves["train"].rate))
    lower.fill_between(steps, rate, color=MUTED, alpha=0.15, linewidth=0)
    lower.plot(steps, rate, color=MUTED, linewidth=1.8)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lower.locator_params(axis="y", nbins=3)
    lower.set_ylabel("learning rate", fontsize=12, color=INK)
    lower.set_xlabel("step", fontsize=13, color=INK)
    upper.set_ylabel(f"loss (nats per {unit.removesuffix('s')})", fontsize=13, color=INK)
    upper.set_title(title, fontsize=17, fontweight="bold", color=INK, loc="left", pad=10, parse_math=False)
    last = max(curve.steps[-1] for curve in curves.values())
    lower.set_xlim(0, last * 1.02)
    lower.locator_params(axis="x", integer=True)
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if per_step:
        seen = upper.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
        seen.xaxis.set_major_formatter(lambda value, _: f"{short(value)} {unit}" if value else "")
        seen.locator_params(axis="x", nbins=5)
        seen.tick_params(labelsize=11, labelcolor=MUTED, color=MUTED, length=4)
        seen.spines["top"].set_visible(False)
    figure.align_ylabels()
    return png(figure)


def _draw_losses(axis: Any, curves: Mapping[str, Curve]) -> None:
    """Draw the training loss, raw and smoothed, and each validation set; choose the y range."""
    steps, loss = _finite(curves["train"].steps, curves["train"].loss)
    if not len(loss):
        return
    smooth = _smooth(loss)
    axis.plot(*_envelope(steps, loss), color=TRAIN, alpha=0.22, linewidth=0.8)
    axis.plot(*_envelope(steps, smooth), color=TRAIN, linewidth=2.4, label=f"train  {smooth[-1]:.3f}")
    lowest, highest = [smooth[-1], np.percentile(loss, 0.5)], [smooth[len(smooth) // 100]]
    sets = (item for item in sorted(curves.items()) if item[0] != "train")
    for color, (name, curve) in zip(itertools.cycle(SETS), sets, strict=False):
        x, y = _finite(curve.steps, curve.loss)
        if len(x):
            line = dict(color=color, linewidth=2, marker="o", markersize=6, markeredgecolor="white")
            axis.plot(x, y, label=f"{name}  {y[-1]:.3f}", **line)
            lowest.append(y.min())
            highest.append(y[-1])
    margin = 0.06 * (max(highest) - min(lowest)) or 0.1
    axis.set_ylim(min(lowest) - margin, max(highest) + margin)
    legend = axis.legend(fontsize=14, frameon=False, labelcolor=INK, loc="upper right")
    for text in legend.get_texts():
        text.set_parse_math(False)


def style(axis: Any) -> None:
    """Give an axis a grid and no frame."""
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=12, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)


def _finite(steps: array, values: array) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays, without the points whose value is NaN."""
    x, y = np.array(steps), np.array(values)
    keep = np.isfinite(y)
    return x[keep], y[keep]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a thirtieth of the points, narrower at the start, where the loss falls fast."""
    n = len(values)
    i = np.arange(n)
    half = np.minimum(max(3, n // 60), i)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = i - half, np.minimum(i + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def _envelope(x: np.ndarray, y: np.ndarray, bins: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Thin a long curve to the lowest and highest point of each bin, so that a million steps draw at once."""
    if len(x) <= 4 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    return np.repeat(x[edges], 2), np.stack([low, high], axis=1).ravel()


def short(number: float) -> str:
    """Write a count with three digits: 950, 12.3k, 1.24M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g}{unit}"
    return f"{number:.0f}"
