"""The sections that a run's own files fill: how it is, its curves, samples, scores, times and config."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aether.config import Config, build, knobs
from aether.errors import InputError
from aether.report.section import Item, Passage, Picture, Section, Table
from aether.train import ledger
from aether.train.curves import CURVES, short
from aether.train.metrics import METRICS, SAMPLES, TELEMETRY, read
from aether.train.panels import draw_telemetry
from aether.workdir import Workdir

Lines = list[dict[str, Any]]

LAST = 5  # samples that are shown
COLUMNS = ("loss", "perplexity", "bits_per_byte", "accuracy", "top5", "calibration_error")
PHASES = {
    "start-up": "imports",
    "data": "data",
    "init": "first state",
    "compile": "compile",
    "telemetry": "telemetry",
    "restore": "restore",
}


def told(folder: Workdir) -> tuple[dict[str, str], list[Section]]:
    """Return a few words on a run, each under a label, and the sections, of which the last is its config.

    Raises:
      InputError: there is no run.
    """
    record, lines = folder.read_json("config.json"), read(folder.local / METRICS)
    return _facts(folder, record, lines), list(_sections(folder, record, lines))


def _facts(folder: Workdir, record: Mapping[str, Any], lines: Lines) -> dict[str, str]:
    config = build(record["config"])
    validated = [line for line in lines if line["split"] != "train"]
    found = {"model": config.model.kind, "size": _size(config)}
    if lines:
        step = max(line["step"] for line in lines)
        found["steps"] = f"{step:,} of {config.train.steps:,}"
        found[f"{config.unit} seen"] = short(step * config.per_step)
    for name in dict.fromkeys(line["split"] for line in validated):
        last = [line for line in validated if line["split"] == name][-1]
        if config.unit == "images" and last.get("accuracy") is not None:
            found[f"{name} accuracy"] = f"{last['accuracy']:.2%}"
        elif last.get("loss") is not None:
            found[f"{name} loss"] = f"{last['loss']:.4f} nats"
    path = folder.local / ledger.GOODPUT
    if ledger.sessions(path):
        found["goodput"] = f"{ledger.read(path).share:.1%}"
    return found | {"aether": str((record.get("versions") or {}).get("aether") or "unknown")}


def _size(config: Config) -> str:
    m = config.model
    if m.family == "resnet":
        return f"blocks {m.stages}, width {m.width}"
    return f"{m.layers} layers, width {m.width}, {m.heads} heads"


def _sections(folder: Workdir, record: Mapping[str, Any], lines: Lines) -> Iterator[Section]:
    """Yield what there is something of."""
    curves = folder.local / CURVES
    if curves.exists():
        yield Section("curves", "Curves", items=(Picture(CURVES, curves.read_bytes(), "Loss and learning rate."),))
    scores = list(_scores(folder, lines))
    if scores:
        yield Section("scores", "Scores", items=tuple(scores))
    samples = {line["step"]: line["text"] for line in read(folder.local / SAMPLES)}
    if samples:
        texts = [Passage(((samples[step], 0.0),), f"After step {step:,}") for step in sorted(samples)[-LAST:]]
        yield Section("samples", "Samples", items=tuple(reversed(texts)))
    try:
        png = draw_telemetry(read(folder.local / TELEMETRY))
    except InputError:  # there is none
        pass
    else:
        picture = Picture("telemetry.png", png, "What each ⵟ layer did, by depth.")
        yield Section("telemetry", "Units in training", items=(picture,))
    if ledger.sessions(folder.local / ledger.GOODPUT):
        yield _time(folder.local / ledger.GOODPUT)
    yield _config(record)


def _scores(folder: Workdir, lines: Lines) -> Iterator[Item]:
    validated = [line for line in lines if line["split"] != "train"]
    for name in dict.fromkeys(line["split"] for line in validated):
        rows = [line for line in validated if line["split"] == name]
        columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
        yield Table.of(({"step": row["step"]} | {c: row.get(c) for c in columns} for row in rows), name)
    evaluation = folder.local / "evaluation"
    tasks = []
    for file in sorted(evaluation.glob("*.json")):
        result = json.loads(file.read_bytes())
        for metric in (key.removesuffix("_stderr") for key in result if key.endswith("_stderr")):
            words = dict(task=file.stem, metric=metric.replace("_", " "), value=result[metric])
            tasks.append(words | {"± standard error": result[f"{metric}_stderr"]})
    if tasks:
        yield Table.of(tasks, "Tasks, and the step of the checkpoint")
    last: dict[str, Path] = {}  # the pictures of each set, of its last step alone
    for place in sorted((p for p in evaluation.glob("*-*") if p.is_dir()), key=_step):
        last[place.name.rpartition("-")[0]] = place
    for place in last.values():
        for picture in sorted(place.glob("*.png")):
            yield Picture(picture.name, picture.read_bytes(), f"{place.name}: {picture.stem}")


def _step(place: Path) -> int:
    step = place.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def _time(path: Path) -> Section:
    found, made = ledger.read(path), ledger.sessions(path)
    rows = [
        {"where the time went": row, "seconds": round(seconds, 1), "share, %": round(100 * seconds / found.wall, 1)}
        for row, seconds in found.seconds.items()
        if seconds >= 0.05
    ]
    starts = [
        {"start": k + 1, "from step": session["first"]}
        | {f"{word}, s": session["seconds"].get(phase) for phase, word in PHASES.items()}
        | {"steps made": session["made"]}
        for k, session in enumerate(made)
    ]
    items = (Table.of(rows), Table.of(starts[:1] + starts[1:][-9:], "The phases of each start; of many, the last ones"))
    return Section("time", "Time", (ledger.line(found)[0].upper() + ledger.line(found)[1:] + ".",), items)


def _config(record: Mapping[str, Any]) -> Section:
    values: Mapping[str, Any] = record["config"]
    rows = []
    for key, knob in knobs():
        section, _, name = key.partition(".")
        usual = knob.default_factory() if callable(knob.default_factory) else knob.default
        value = values.get(section, {}).get(name, usual)
        rows.append({"knob": key, "value": _word(value), "default": "" if value == usual else _word(usual)})
    rows.sort(key=lambda row: row["default"] == "")
    items = [Table.of(rows, "Knobs, those that differ from their defaults first")]
    changes = record.get("changes") or []
    if changes:
        items.append(Table.of(({k: str(v) for k, v in change.items()} for change in changes), "Changed on the way"))
    versions = {k: v for k, v in (record.get("versions") or {}).items() if v} | {"git": record.get("git")}
    items.append(Table.of(({"package": k, "version": str(v)} for k, v in versions.items() if v), "Versions"))
    return Section("config", "Config", items=tuple(items))


def _word(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else str(value)
