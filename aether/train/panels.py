"""A picture of `telemetry.jsonl`: a panel a number, a line a layer."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from aether.errors import InputError
from aether.figures import INK, MUTED, new_figure, png
from aether.train.curves import short, style

# name -> title, whether the axis is logarithmic where values differ tenfold
PANELS = {
    "distance_5": ("distance to the nearest centre, 5 %", False),
    "distance_50": ("median of that distance", False),
    "distance_95": ("its 95 %", False),
    "alignment": ("alignment, mean of the largest |cos|", False),
    "epsilon_share": ("share of outputs with D < ε", False),
    "dead_share": ("share of dead units", False),
    "entropy": ("entropy of attention (nats)", False),
    "scale": ("scale of outputs (rms)", True),
    "squared_norm": ("mean squared RKHS norm", True),
}
COLUMNS = 3
ATTENTION, UNITS = "GnBu", "YlOrRd"  # colour maps by depth: cold and warm, both darkening
SPAN = (0.35, 1.0)  # of them that is used

Records = Iterable[Mapping[str, Any]]
Series = dict[str, tuple[list[int], list[float]]]


def draw_telemetry(records: Records, title: str = "") -> bytes:
    """Return a PNG (1800 wide) of a run's telemetry, layers coloured by depth, attention apart from the others.

    Args:
      records: the lines of `telemetry.jsonl`, as `aether.train.metrics.read` returns them.
      title: above all panels.

    Raises:
      InputError: there are no lines.
    """
    panels, layers = _series(records)
    names = [name for name in PANELS if name in panels]
    if not names:
        raise InputError("There is no telemetry to draw; train with train.telemetry_every above 0.")
    rows = -(-len(names) // COLUMNS)
    figure = new_figure(12, 2.7 * rows + 1.1, dpi=150)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
    colors = _colors(layers)
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, name, panels[name], colors)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(names) - COLUMNS) : len(names)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("step", fontsize=10, color=INK)
    if title:
        figure.suptitle(title, fontsize=15, fontweight="bold", color=INK, x=0.01, ha="left")
    _legend(figure, layers, colors)
    return png(figure)


def _series(records: Records) -> tuple[dict[str, Series], list[str]]:
    """Return number -> layer -> (steps, values), and the layers in the order of the network."""
    panels: dict[str, Series] = defaultdict(dict)
    layers: dict[str, None] = {}
    for record in records:
        layers[record["split"]] = None
        for name in PANELS:
            if record.get(name) is not None:
                steps, values = panels[name].setdefault(record["split"], ([], []))
                steps.append(record["step"])
                values.append(record[name])
    return panels, list(layers)


def _kind(layer: str) -> str:
    return ATTENTION if layer.endswith("attention") else UNITS


def _colors(layers: list[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    found = {}
    for kind in (ATTENTION, UNITS):
        own = [layer for layer in layers if _kind(layer) == kind]
        for k, layer in enumerate(own):
            share = k / max(len(own) - 1, 1)
            found[layer] = colormaps[kind](SPAN[0] + (SPAN[1] - SPAN[0]) * share)
    return found


def _panel(axis: Any, name: str, series: Series, colors: dict[str, Any]) -> None:
    style(axis)
    title, logarithmic = PANELS[name]
    width = 1.8 if len(series) <= 12 else 1.1 if len(series) <= 32 else 0.7
    for layer, (steps, values) in series.items():
        marker = dict(marker="o", markersize=3) if len(steps) == 1 else {}
        axis.plot(steps, values, color=colors[layer], linewidth=width, alpha=0.9, **marker)
    every = [v for _, values in series.values() for v in values]
    if logarithmic and 0 < 10 * min(every) < max(every):
        axis.set_yscale("log")
    elif name.endswith("share"):
        top = max(*every, 0.01)
        axis.set_ylim(-0.02 * top, 1.1 * top)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.tick_params(labelsize=9)
    axis.xaxis.set_major_formatter(lambda value, _: short(value) if value >= 1 else "0")
    axis.set_title(title, fontsize=11, color=INK, loc="left")


def _legend(figure: Any, layers: list[str], colors: dict[str, Any]) -> None:
    """Name the layers, of many of a kind the first, the middle and the last."""
    from matplotlib.lines import Line2D

    kinds = [own for kind in (ATTENTION, UNITS) if (own := [layer for layer in layers if _kind(layer) == kind])]
    few = [own if len(own) <= 4 else [own[0], own[len(own) // 2], own[-1]] for own in kinds]
    shown = [layer for column in itertools.zip_longest(*few) for layer in column]  # a row a kind
    lines = [Line2D([], [], color=colors.get(layer, "none"), linewidth=3, label=layer or " ") for layer in shown]
    figure.legend(
        handles=lines, loc="outside lower left", ncols=max(map(len, few)), fontsize=10, frameon=False, labelcolor=MUTED
    )
