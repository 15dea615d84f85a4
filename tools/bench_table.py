"""How rows of `python -m tools.bench` are printed."""

from collections.abc import Callable, Sequence
from typing import Any

from tools.bench_compare import Row

MIB = 2**20
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("ms", lambda x: f"{x:.2f}"),
    "cycles": ("M cycles", lambda x: f"{x / 1e6:.3f}"),
    "ratio": ("ratio", lambda x: f"{x:.2f}"),
    "saved_bytes": ("saved MiB", lambda x: f"{x / MIB:.1f}"),
    "temp_bytes": ("temp MiB", lambda x: f"{x / MIB:.1f}"),
    "flops": ("GFLOP of products", lambda x: f"{x / 1e9:.2f}"),
    "compiler_flops": ("GFLOP, loops once", lambda x: f"{x / 1e9:.2f}"),
    "hbm_bytes": ("HBM traffic MiB", lambda x: f"{x / MIB:.0f}"),
    "tokens_per_second": ("tokens/s", lambda x: f"{x:.0f}"),
    "images_per_second": ("images/s", lambda x: f"{x:.0f}"),
    "mfu": ("MFU", lambda x: f"{100 * x:.1f} %"),
    "kernels": ("kernels without cycles", lambda x: ", ".join(f"{n} {name}" for name, n in x.items())),
    "kernel_flops": ("GFLOP stated by kernels", lambda x: f"{x / 1e9:.2f}"),
    "kernel_bytes": ("HBM MiB stated by kernels", lambda x: f"{x / MIB:.0f}"),
    "note": ("note", str),
}


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table; columns in which nobody has anything are left out."""
    keys = [k for k in COLUMNS if any(row.get(k) not in (None, {}) for row in rows)]
    lines = [["", *(COLUMNS[k][0] for k in keys)], ["---", *("---:" for _ in keys)]]
    for row in rows:
        lines.append([row["name"], *("–" if row.get(k) is None else COLUMNS[k][1](row[k]) for k in keys)])
    return "\n".join(["", f"**{rows[0]['table']}**", "", *(f"| {' | '.join(line)} |" for line in lines)])
