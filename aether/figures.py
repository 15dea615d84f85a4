"""What all our pictures share: colours, figures that need no screen, PNG."""

import io
import warnings
from typing import Any

INK, MUTED = "#1f2933", "#7b8794"


def new_figure(width: float, height: float, dpi: int = 140) -> Any:
    """Return an empty figure of so many inches, which no screen is needed for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axis: Any) -> None:
    """Give an axis a light grid, and no frame at the top and the right."""
    axis.grid(color="#e4e7eb")
    axis.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
