"""The pictures of a report, as PNG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aether.explain.attribution import Attribution
from aether.figures import INK, MUTED, new_figure, png

FOR, AGAINST, GRID = "#2f6fde", "#e4572e", "#e4e7eb"
PICTURES = 64  # of a first layer
NAMED = 14  # layers in a legend


def draw_layer_shares(layers: Mapping[str, np.ndarray]) -> bytes:
    """Return a bar a layer: the mean share in a logit over inputs, and the middle 80 % of them as a line."""
    figure = new_figure(8.5, 0.24 * len(layers) + 1.1)
    axis = figure.subplots()
    y = np.arange(len(layers))
    mean = np.array([values.mean() for values in layers.values()])
    low, high = np.array([np.percentile(values, (10, 90)) for values in layers.values()]).T
    axis.barh(y, mean, color=np.where(mean >= 0, FOR, AGAINST), height=0.7)
    axis.hlines(y, low, high, color=INK, linewidth=1.2)
    axis.axvline(0, color=MUTED, linewidth=0.8)
    axis.set_yticks(y, list(layers), fontsize=9, color=INK)
    axis.invert_yaxis()
    axis.set_xlabel("share in the logit: mean, and the middle 80 % of the inputs", color=INK)
    _plain(axis)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    return png(figure)


def draw_image_shares(images: np.ndarray, names: Sequence[str], found: Sequence[Attribution]) -> bytes:
    """Return a row an image: itself, the shares of its places, those of the layers, and the largest units."""
    figure = new_figure(11, 2.0 * len(found) + 0.4)
    grid = figure.subplots(len(found), 4, squeeze=False, width_ratios=(1, 1, 1.6, 2.2))
    for row, image, name, one in zip(grid, images, names, found, strict=True):
        shares = place_shares(one, image.shape[0])
        _picture(row[0], image)
        row[0].set_title(name, fontsize=10, color=INK, parse_math=False)
        _picture(row[1], image, alpha=0.35)
        most = np.abs(shares).max() or 1.0
        row[1].imshow(shares, cmap="RdBu", vmin=-most, vmax=most, alpha=0.8)
        row[1].set_title(f"logit {one.logit:.2f}", fontsize=10, color=INK)
        values = np.array(list(one.layers.values()))
        row[2].barh(np.arange(len(values)), values, color=np.where(values >= 0, FOR, AGAINST))
        row[2].set_yticks(np.arange(len(values)), list(one.layers), fontsize=max(4, min(8, 90 // len(values))))
        row[2].invert_yaxis()
        row[2].axvline(0, color=MUTED, linewidth=0.8)
        _plain(row[2])
        row[3].axis("off")
        lines = [f"{share:+.2f}  {layer} unit {unit}" for layer, unit, share in one.top_units(7)]
        text = "\n".join(lines) or "no hidden units"
        row[3].text(0, 0.98, text, va="top", fontsize=9, color=INK, family="monospace", transform=row[3].transAxes)
    return png(figure)


def place_shares(found: Attribution, side: int) -> np.ndarray:
    """Return the share of each pixel (side, side), those of coarser places spread evenly, summed over layers."""
    total = np.zeros((side, side))
    for name, a in found.sources.items():
        if name in found.weights:  # attention: heads by patches, perhaps with a class token before them
            flat = a.sum(0)
            n = math.isqrt(len(flat))
            a = flat[len(flat) - n * n :].reshape(n, n)
        h, w = a.shape
        rows, columns = np.arange(side) * h // side, np.arange(side) * w // side
        pixels = np.outer(np.bincount(rows, minlength=h), np.bincount(columns, minlength=w))  # of each place
        total += (a / np.maximum(pixels, 1))[rows][:, columns]
    return total


def draw_kernels(pictures: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """Return first layers side by side, each (units, h, w, c) in 0..1 under its name."""
    columns = math.ceil(math.sqrt(max(min(len(images), PICTURES) for _, images in pictures)))
    figure = new_figure(4.6 * len(pictures), 4.9)
    figure.get_layout_engine().set(wspace=0.08)
    for axis, (name, images) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        shown = images[:PICTURES]
        axis.imshow(_tiled(shown, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{name}: {len(shown)} of {len(images)}", color=INK, fontsize=11, parse_math=False)
        axis.axis("off")
    return png(figure)


def _tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay pictures out with white lines between them."""
    times = max(1, round(24 / images.shape[1]))  # small ones larger, so that the lines stay thin
    images = images.repeat(times, 1).repeat(times, 2)
    n, h, w, c = images.shape
    rows, gap = math.ceil(n / columns), max(1, round(h / 12))
    sheet = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, c))
    for k, image in enumerate(images):
        i, j = divmod(k, columns)
        sheet[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = image
    return sheet if c == 3 else sheet.mean(-1)


def draw_nearest(
    pictures: np.ndarray, rows: np.ndarray, centres: np.ndarray, sizes: np.ndarray, labels: Sequence[str]
) -> bytes:
    """Return a row a unit: the images that come nearest to it, with the place marked.

    Args:
      pictures: all images, uint8 (n, s, s, c).
      rows: (units, m), which images.
      centres: (units, m, 2), row and column of the place in pixels.
      sizes: (units, m), side of the mark in pixels.
      labels: of the units.
    """
    from matplotlib.patches import Rectangle

    units, m = rows.shape
    figure = new_figure(1.15 * m + 1.2, 1.2 * units + 0.2, dpi=110)
    for k, axes in enumerate(figure.subplots(units, m, squeeze=False)):
        for axis, row, (i, j), size in zip(axes, rows[k], centres[k], sizes[k], strict=True):
            _picture(axis, pictures[row])
            corner = (j - size / 2, i - size / 2)
            axis.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=AGAINST, linewidth=1.4))
        axes[0].text(-0.15, 0.5, labels[k], transform=axes[0].transAxes, ha="right", va="center", fontsize=9, color=INK)
    return png(figure)


def draw_spectra(spectra: Mapping[str, np.ndarray]) -> bytes:
    """Return the eigenvalues of each layer's Gram matrix, as shares of their sum, coloured by depth."""
    from matplotlib import colormaps

    figure = new_figure(8.5, 4.6)
    axis = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(spectra)))
    for (name, values), colour in zip(spectra.items(), colours, strict=True):
        shares = np.maximum(values, 0) / values[values > 0].sum()
        axis.plot(np.arange(1, len(shares) + 1), np.where(shares > 1e-12, shares, np.nan), color=colour, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("eigenvalue", color=INK)
    axis.set_ylabel("share of their sum", color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    _plain(axis)
    _name_some(axis)
    return png(figure)


def draw_over_training(steps: Sequence[int], values: Mapping[str, Sequence[float]], label: str) -> bytes:
    """Return a line a layer over the steps of checkpoints, coloured by depth."""
    from matplotlib import colormaps

    figure = new_figure(8.5, 4.2)
    axis = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(values)))
    for (name, line), colour in zip(values.items(), colours, strict=True):
        axis.plot(steps, line, color=colour, marker="o", markersize=4, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(label, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    _plain(axis)
    _name_some(axis)
    return png(figure)


def _name_some(axis: Any) -> None:
    """Name the lines of layers, of many the first, some between and the last."""
    handles, labels = axis.get_legend_handles_labels()
    shown = np.unique(np.linspace(0, len(labels) - 1, min(NAMED, len(labels))).round().astype(int))
    names = dict(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.legend([handles[i] for i in shown], [labels[i] for i in shown], **names)


def _picture(axis: Any, image: np.ndarray, alpha: float = 1.0) -> None:
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, alpha=alpha)
    axis.axis("off")


def _plain(axis: Any) -> None:
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)


def draw_outside(inside: np.ndarray, sets: Mapping[str, np.ndarray], threshold: float) -> bytes:
    """Return where a score's middle half and middle 90 % lie, inside and in each set, and the threshold."""
    rows = {"inside": inside, **sets}
    figure = new_figure(8.5, 0.36 * len(rows) + 1.1)
    axis = figure.subplots()
    low = min(inside.min(), threshold)
    scale = max(float(np.percentile(inside, 95) - np.percentile(inside, 5)), 1e-30)
    for k, (name, values) in enumerate(rows.items()):
        five, quarter, half, three, most = np.percentile(values, (5, 25, 50, 75, 95))
        colour = FOR if name == "inside" else AGAINST
        axis.hlines(k, five, most, color=colour, linewidth=1.5)
        axis.hlines(k, quarter, three, color=colour, linewidth=7)
        axis.plot(half, k, marker="|", color="white", markersize=8, markeredgewidth=2)
    axis.axvline(threshold, color=INK, linewidth=1, linestyle="--")
    axis.set_xscale("symlog", linthresh=3 * scale + abs(float(low)))
    axis.set_yticks(range(len(rows)), list(rows), color=INK)
    axis.invert_yaxis()
    axis.set_xlabel("score: middle half and middle 90 %", color=INK)
    _plain(axis)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    return png(figure)
