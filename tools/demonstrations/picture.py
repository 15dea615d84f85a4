"""What the demonstrations share: flags, the look of the pictures, and how picture and numbers come out."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from aether.figures import INK, MUTED, new_figure, png
from aether.storage import write_atomic
from launch import cli

GRID = "#e4e7eb"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by the colour-blind
MARKERS = ("o", "s", "^", "D")
DPI = 160


def define(steps: int | None = None) -> flags.FlagValues:
    """Return the flags of a demonstration: `--out`, `--seed`, and `--steps` if it trains."""
    values = cli.new_flags()
    flags.DEFINE_string("out", "", "file of the picture, PNG", values)
    flags.DEFINE_integer("seed", 0, "of data and starts", lower_bound=0, flag_values=values)
    if steps is not None:
        flags.DEFINE_integer("steps", steps, "of training", lower_bound=1, flag_values=values)
    return values


def finish(values: flags.FlagValues, figure: Any, numbers: Mapping[str, Any]) -> None:
    """Write the picture to `--out` and print the numbers as one line of JSON."""
    out = Path(cli.require(values, "out", "demonstration.png"))
    write_atomic(out, with_palette(png(figure)))
    print(json.dumps(numbers, ensure_ascii=False))


def with_palette(picture: bytes) -> bytes:
    """Return a PNG of 256 colours, which is a third as large."""
    buffer, image = io.BytesIO(), Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def panels(title: str, rows: int, columns: int, height: float, **options: Any) -> tuple[Any, np.ndarray]:
    """Return a figure 1600 pixels wide with a title, and its axes (rows, columns)."""
    figure = new_figure(10, height, dpi=DPI)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    figure.suptitle(title, x=0.015, ha="left", fontsize=17, fontweight="bold", color=INK)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plane(axis: Any, title: str, limits: tuple[float, float], ticks: tuple[float, ...] = ()) -> None:
    """Make an axis a square piece of the plane with a title."""
    axis.set_aspect("equal")
    axis.set_xlim(*limits)
    axis.set_ylim(*limits)
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(labelsize=11, colors=INK, length=0)
    for side in axis.spines.values():
        side.set_color(MUTED)
    axis.set_title(title, fontsize=13, color=INK, loc="left", pad=6)


def mesh(limits: tuple[float, float], count: int = 201) -> np.ndarray:
    """Return a grid of points of the square, (count, count, 2), float32, rows by the second coordinate."""
    line = np.linspace(*limits, count, dtype=np.float32)
    return np.stack(np.meshgrid(line, line), -1)


def scatter(axis: Any, x: np.ndarray, labels: np.ndarray, size: float = 18) -> None:
    """Draw points (n, 2) with the colour and the marker of their label."""
    for label in np.unique(labels):
        look = dict(color=COLORS[label], marker=MARKERS[label], edgecolor="white", linewidth=0.5)
        axis.scatter(*x[labels == label].T, s=size, zorder=3, **look)


def rounded(numbers: Any, digits: int = 4) -> Any:
    """Return numbers, in lists and dictionaries too, with so many significant digits."""
    if isinstance(numbers, Mapping):
        return {key: rounded(value, digits) for key, value in numbers.items()}
    if isinstance(numbers, str):
        return numbers
    if np.ndim(numbers):
        return [rounded(value, digits) for value in numbers]
    number = float(numbers)
    return int(number) if number.is_integer() else float(f"{number:.{digits}g}")
