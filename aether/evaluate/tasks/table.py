"""Results of tasks as a person reads them."""

from collections.abc import Mapping
from typing import Any

HEAD = ("task", "metric", "value", "± standard error", "of")
UNITS = ("examples", "documents", "windows")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what `evaluate_tasks` found under `tasks`, a line a metric."""
    rows = [HEAD]
    for label, result in results.items():
        of = next(f"{result[u]:,} {u if result[u] != 1 else u[:-1]}" for u in UNITS if u in result)
        names = [k.removesuffix("_stderr") for k in result if k.endswith("_stderr")]
        for i, name in enumerate(names):
            stderr = result[f"{name}_stderr"]
            error = "–" if stderr is None else f"± {_number(stderr)}"
            rows.append((label if i == 0 else "", name.replace("_", " "), _number(result[name]), error, of * (i == 0)))
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    sides = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
    lines = ("  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _number(x: float) -> str:
    return f"{x:.4f}" if abs(x) < 100 else f"{x:,.1f}" if abs(x) < 1e6 else f"{x:.3g}"
