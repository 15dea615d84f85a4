"""What a report is made of: sections with tables, pictures, and texts whose tokens are coloured."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers; None is what does not apply."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], caption: str = "") -> Self:
        """Make a table of records, with a column for each key of any of them."""
        rows = list(rows)
        columns = tuple(dict.fromkeys(key for row in rows for key in row))
        return cls(columns, tuple(tuple(row.get(key) for key in columns) for row in rows), caption)

    @property
    def numeric(self) -> set[int]:
        """Return the columns that have numbers alone."""
        cells = {k: [row[k] for row in self.rows if row[k] is not None] for k in range(len(self.columns))}
        return {k for k, column in cells.items() if column and all(isinstance(c, int | float) for c in column)}

    def record(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return dict(caption=self.caption, rows=[dict(zip(self.columns, row, strict=True)) for row in self.rows])


@dataclass(frozen=True)
class Picture:
    """A PNG under a name that is a file's."""

    name: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Passage:
    """A text.

    Attributes:
      tokens: pieces of text, each with its share, above 0 for what speaks for something and below for what is against.
      caption: above it.
      notes: lines below it.
    """

    tokens: tuple[tuple[str, float], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()

    def colours(self) -> list[tuple[str, float, str]]:
        """Return (token, strength in percent, for or against) of each, the largest share being 100."""
        most = max((abs(share) for _, share in self.tokens), default=0.0) or 1.0
        return [
            (token, round(100 * abs(share) / most), "for" if share > 0 else "against") for token, share in self.tokens
        ]


Item = Table | Picture | Passage
Content = tuple[tuple[str, ...], tuple[Item, ...]]  # paragraphs, and what stands below them


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      name: one word.
      title: what a reader sees.
      text: paragraphs.
      items: in this order below them.
      trouble: why there is nothing, if there is nothing.
    """

    name: str
    title: str
    text: tuple[str, ...] = ()
    items: tuple[Item, ...] = ()
    trouble: str = ""

    @property
    def pictures(self) -> list[Picture]:
        """Return its pictures."""
        return [item for item in self.items if isinstance(item, Picture)]

    def record(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        found: dict[str, Any] = dict(title=self.title, text=self.text)
        if self.trouble:
            found["trouble"] = self.trouble
        found["tables"] = [item.record() for item in self.items if isinstance(item, Table)]
        found["passages"] = [
            dict(caption=item.caption, tokens=item.tokens, notes=item.notes)
            for item in self.items
            if isinstance(item, Passage)
        ]
        found["pictures"] = [picture.name for picture in self.pictures]
        return found


def shown(value: Any) -> str:
    """Write what a table's cell holds for a reader."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("-", "−")
