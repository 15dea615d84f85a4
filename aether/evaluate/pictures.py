"""Pictures of a classifier's mistakes, as PNG."""

import math
from collections.abc import Sequence

import numpy as np

from aether.evaluate.images import Mistake
from aether.figures import INK, new_figure, png

NAMED = 30  # classes whose names and counts are written
COLUMNS = 6


def draw_confusion(confusion: np.ndarray, names: Sequence[str], images: int) -> bytes:
    """Return the share of each class's images (a row) that is taken for each class (a column), `images` in all."""
    classes = len(confusion)
    names = [_name(names, label) for label in range(classes)]
    totals = confusion.sum(1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros_like(confusion), where=totals > 0)
    side = min(max(4.5, 0.62 * classes + 2.4), 16)
    figure = new_figure(side + 0.6, side)
    axis = figure.subplots()
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= NAMED:
        turned = dict(rotation=45, ha="right", rotation_mode="anchor") if max(map(len, names)) > 3 else {}
        axis.set_xticks(range(classes), names, parse_math=False, **turned)
        axis.set_yticks(range(classes), names, parse_math=False)
        for i, j in np.argwhere(confusion > 0):
            color = "white" if shares[i, j] > 0.5 else INK
            axis.text(j, i, f"{confusion[i, j]:.0f}", ha="center", va="center", color=color, fontsize=9)
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("taken for", color=INK, fontsize=12)
    axis.set_ylabel("class", color=INK, fontsize=12)
    axis.set_title(
        f"{confusion.trace() / images:.2%} of {images:,} images right",
        loc="left",
        color=INK,
        fontweight="bold",
    )
    figure.colorbar(shown, ax=axis, shrink=0.6, label="share of the class").outline.set_visible(False)
    return png(figure)


def draw_mistakes(mistakes: Sequence[Mistake], names: Sequence[str], images: int) -> bytes:
    """Return the images that were taken for another class, the surest guesses first; `images` were looked at."""
    rows = max(1, math.ceil(len(mistakes) / COLUMNS))
    figure = new_figure(1.75 * COLUMNS, 2.1 * rows + 0.6)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for axis, m in zip(grid.flat, mistakes, strict=False):
        axis.imshow(m.image.squeeze(), cmap="gray", vmin=0, vmax=255)
        said = f"{_name(names, m.label)}\n→ {_name(names, m.guess)} {m.confidence:.0%}"
        axis.set_title(said, fontsize=9, color=INK, parse_math=False)
    what = (
        f"The surest mistakes among {images:,} images: class → guess"
        if mistakes
        else f"No mistake in {images:,} images"
    )
    figure.suptitle(what, x=0.01, ha="left", color=INK, fontweight="bold")
    return png(figure)


def _name(names: Sequence[str], label: int) -> str:
    """Name a class: by its number where the model has more classes than the data."""
    return "nothing" if label < 0 else names[label] if label < len(names) else str(label)
