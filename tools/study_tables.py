"""The tables of a study in Markdown, and its picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from aether.config import build
from aether.figures import new_figure, png
from aether.storage import write_atomic
from tools.study_plan import Combination, Results, Study

MISSING, DIVERGED = "–", "diverged"
NAMES = {"loss": "loss", "error": "error %"}


def report(study: Study, results: Results) -> str:
    """Return both tables and what to know about them."""
    tables = [markdown(*main_table(study, results))]
    if study.values:
        tables.append(markdown(*sweep_table(study, results)))
    return "\n\n".join([*tables, *notes(study, results)])


def main_table(study: Study, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: a combination each, at its best value; differences are paired by seed, to the first row."""
    swept = [study.key] if study.values else []
    seeds = [f"seed {seed}" for seed in range(study.seeds)]
    unit = unit_of(study)
    head = ["", *swept, NAMES[study.score], *seeds, "difference", "parameters", f"{unit}/s"]
    rows: list[list[str]] = []
    first: list[float | None] = []
    for c in study.combinations:
        records = [results.get(job.name) for job in study.full(c, results)] or [None] * study.seeds
        losses = [study.score_of(record) for record in records]
        first = first or losses
        pairs = [b - a for a, b in zip(first, losses, strict=True) if a is not None and b is not None]
        known = [record for record in records if record and record["status"] == "done"]
        sizes = [count([r.get(name) for r in known]) for name in ("parameters", f"{unit}_per_second")]
        value = [chosen(study, c, results)] if swept else []
        mean = spread([loss for loss in losses if loss is not None])
        difference = spread(pairs, "+") if rows else ""
        rows.append([c.label, *value, mean, *map(number, losses), difference, *sizes])
    return head, rows


def unit_of(study: Study) -> str:
    """Return what the runs count: tokens or images."""
    return build(study.base).unit


def chosen(study: Study, c: Combination, results: Results) -> str:
    """Write the best value of a combination, marked if no value beyond it was tried."""
    best = study.best(c, results)
    return "none" if best is None else f"{best} (edge)" if edge(best, study.values) else str(best)


def sweep_table(study: Study, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: a combination each, a column for every swept value, the best one bold."""
    rows = []
    for c in study.combinations:
        best = study.best(c, results)
        cells = [(job.value, number(study.score_of(results.get(job.name)))) for job in study.sweep(c)]
        rows.append([c.label, *(f"**{text}**" if value == best else text for value, text in cells)])
    return [study.key, *map(str, study.values)], rows


def notes(study: Study, results: Results) -> list[str]:
    """Return the sentences under the tables."""
    found = []
    for c in study.combinations:
        best = study.best(c, results)
        end = edge(best, study.values)
        if end:
            found.append(f"{c.label}: {study.key}={best} is the {end} value tried; let --sweep go beyond it.")
    names = study.jobs(results)
    records = [results[name] for name in names if name in results]
    failed = [r["run"] for r in records if r["status"] == "failed"]
    if failed:
        found.append(f"Failed, to be tried again by the same command: {', '.join(failed)}.")
    missing = len(study.expected()) - len(records)
    if missing > 0:
        found.append(f"{missing} runs are missing.")
    revisions = sorted({r["git"] for r in records if r["git"]})
    return [*found, f"Revision: {', '.join(revisions)}."] if revisions else found


def edge(best: float | None, values: Sequence[float]) -> str:
    """Say which end of the values the best one is; "" if it is inside, or there was no choice."""
    if best is None or len(values) < 2 or best not in (values[0], values[-1]):
        return ""
    return "smallest" if best == values[0] else "largest"


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, s / √n with n - 1 in s; NaN where there is none."""
    if not values or not all(map(math.isfinite, values)):
        return (math.inf if values else math.nan), math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def spread(values: Sequence[float], sign: str = "") -> str:
    """Write mean ± standard error; `sign` "+" shows a plus."""
    mean, error = mean_error(values)
    if not math.isfinite(mean):
        return DIVERGED if values else MISSING
    return f"{mean:{sign}.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def count(values: Sequence[float | None]) -> str:
    """Write the median of what is known."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):,.0f}" if known else MISSING


def number(loss: float | None) -> str:
    """Write what `Study.score_of` gives."""
    return MISSING if loss is None else f"{loss:.4f}" if math.isfinite(loss) else DIVERGED


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table that reads well as plain text, too."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def plot(study: Study, results: Results, path: Path) -> None:
    """Draw the losses of the sweep, a line for each combination, its best ringed; crosses at the top diverged."""
    figure = new_figure(8, 5, dpi=150)
    axis = figure.subplots()
    for c in study.combinations:
        losses = [study.score_of(results.get(job.name)) for job in study.sweep(c)]
        heights = [loss if loss is not None and math.isfinite(loss) else math.nan for loss in losses]
        (line,) = axis.plot(study.values, heights, "o-", label=c.label)
        lost = [value for value, loss in zip(study.values, losses, strict=True) if loss == math.inf]
        top = axis.get_xaxis_transform()
        axis.plot(lost, [0.98] * len(lost), "x", color=line.get_color(), transform=top)
        best = [i for i, value in enumerate(study.values) if value == study.best(c, results)]
        axis.plot(study.values, heights, "o", markevery=best, ms=13, mfc="none", color=line.get_color())
    if study.values[0] > 0:
        axis.set_xscale("log")
    axis.set_xticks(study.values, [f"{value:g}" for value in study.values])
    axis.minorticks_off()
    axis.set_xlabel(study.key)
    what = "loss (nats)" if study.score == "loss" else "error (%)"
    axis.set_ylabel(f"validation {what} after {study.combinations[0].sweep_steps} steps")
    axis.grid(color="#e4e7eb")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    write_atomic(path, png(figure))
