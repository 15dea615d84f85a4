"""The tables of a study in Markdown, and its picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from aether.config import build
from aether.figures import new_figure, plain, png
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
    job = study.best(c, results)
    best = job and job.value
    return "none" if best is None else f"{best} (edge)" if edge(best, study.values) else str(best)


def sweep_table(study: Study, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: a combination each, a column for every swept value, the best one bold.

    Where a value was left behind in a shorter rung, the steps of that follow in brackets.
    """
    rows = []
    for c in study.combinations:
        best, longest = study.best(c, results), {job.value: job for job in study.sweep(c, results)}
        cells = []
        for value in study.values:
            job = longest[value]
            text = number(study.score_of(results.get(job.name)))
            text += f" ({job.steps})" if job.steps < c.sweep_steps else ""
            cells.append(f"**{text}**" if job == best else text)
        rows.append([c.label, *cells])
    return [study.key, *map(str, study.values)], rows


def notes(study: Study, results: Results) -> list[str]:
    """Return the sentences under the tables."""
    found = []
    for c in study.combinations if study.values else []:
        job = study.best(c, results)
        best = job and job.value
        end = edge(best, study.values)
        if end:
            found.append(f"{c.label}: {study.key}={best} is the {end} value tried; let --sweep go beyond it.")
    names = study.jobs(results)
    records = [results[name] for name in names if name in results]
    failed = [r["run"] for r in records if r["status"] == "failed"]
    if failed:
        found.append(f"Failed, to be tried again by the same command: {', '.join(failed)}.")
    if study.finalists:
        finals = study.finals(results)
        losers = [c.label for c in study.combinations if c.label not in finals]
        found.append(f"Left behind: {', '.join(losers)}.")
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
    """Draw the losses of the sweep, a line for each combination, its best ringed; crosses at the top diverged.

    Shorter rungs are dotted.
    """
    figure = new_figure(8, 5, dpi=150)
    axis = figure.subplots()
    for c in study.combinations:
        best, color = study.best(c, results), None
        for steps in sorted({job.steps for job in study.sweep(c, results)}, reverse=True):
            jobs = [job for job in study.sweep(c, results) if job.steps == steps]
            at, losses = [job.value for job in jobs], [study.score_of(results.get(job.name)) for job in jobs]
            heights = [loss if loss is not None and math.isfinite(loss) else math.nan for loss in losses]
            how = dict(color=color, label=c.label) if color is None else dict(color=color, ls=":", ms=3)
            (line,) = axis.plot(at, heights, "o-" if color is None else "o", **how)
            color = line.get_color()
            lost = [value for value, loss in zip(at, losses, strict=True) if loss == math.inf]
            axis.plot(lost, [0.98] * len(lost), "x", color=color, transform=axis.get_xaxis_transform())
            ringed = [i for i, job in enumerate(jobs) if job == best]
            axis.plot(at, heights, "o", markevery=ringed, ms=13, mfc="none", color=color)
    if study.values[0] > 0:
        axis.set_xscale("log")
    axis.set_xticks(study.values, [f"{value:g}" for value in study.values])
    axis.minorticks_off()
    axis.set_xlabel(study.key)
    what = "loss (nats)" if study.score == "loss" else "error (%)"
    lengths = sorted({c.sweep_steps for c in study.combinations})
    axis.set_ylabel(f"validation {what} after {' or '.join(map(str, lengths))} steps")
    plain(axis)
    beside = dict(loc="upper left", bbox_to_anchor=(1.0, 1.0)) if len(study.combinations) > 4 else {}
    axis.legend(frameon=False, **beside)
    write_atomic(path, png(figure))


def plot_compute(study: Study, results: Results, path: Path) -> None:
    """Draw the mean scores of the whole runs over their FLOPs, a point a combination and a color a group.

    A line joins the points of a group that no cheaper one of it beats; bars are standard errors. Runs of an earlier
    version, which did not write their FLOPs down, are left out.
    """
    figure = new_figure(8, 5, dpi=150)
    axis = figure.subplots()
    for group in dict.fromkeys(c.group for c in study.combinations):
        points = []
        for c in study.combinations:
            records = [results.get(job.name, {}) for job in study.full(c, results) if c.group == group]
            known = [r for r in records if r.get("flops") and r["status"] == "done"]
            if known:
                points.append((known[0]["flops"], *mean_error([study.score_of(r) for r in known])))
        if not points:
            continue
        points.sort()
        x, y, error = zip(*points, strict=True)
        drawn = axis.errorbar(x, y, [0.0 if math.isnan(e) else e for e in error], fmt="o", capsize=3, label=group)
        front = [i for i in range(len(y)) if y[i] <= min(y[: i + 1])]
        axis.plot([x[i] for i in front], [y[i] for i in front], "-", color=drawn.lines[0].get_color())
    axis.set_xscale("log")
    axis.set_xlabel("floating-point operations of the training")
    axis.set_ylabel(f"validation {'loss (nats)' if study.score == 'loss' else 'error (%)'}")
    plain(axis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    write_atomic(path, png(figure))
