"""Sections from a run's files, which are written here by hand."""

import json

import pytest

from aether.config import build
from aether.errors import InputError
from aether.report.records import LAST, told
from aether.report.section import Passage, Picture, Table
from aether.workdir import Workdir


@pytest.fixture
def folder(tmp_path):
    config = build(dict(model=dict(kind="gpt2", layers=3), train=dict(steps=40), data=dict(context=64)))
    record = dict(config=config.to_json(), versions={"jax": "0.10", "aether": "0.1"}, git="abc", data_fingerprint="f")
    change = dict(time="now", key="train.steps", **{"from": 20, "to": 40})
    (tmp_path / "config.json").write_text(json.dumps(record | dict(changes=[change])))
    lines = [dict(step=s, split="train", loss=3.0 - s / 40) for s in (10, 20)]
    lines += [dict(step=s, split="held", loss=2.5 - s / 40, accuracy=0.5, bits_per_byte=None) for s in (10, 20)]
    write(tmp_path / "metrics.jsonl", lines)
    write(tmp_path / "samples.jsonl", [dict(step=s, split="sample", text=f"words {s}") for s in range(LAST + 3)])
    seconds = {"start-up": 1.0, "compile": 3.0, "steps": 6.0}
    first = dict(session="a", began=0.0, first=0, step=20, made=20, seconds=seconds, longest=[1.0, "steps", 3])
    write(tmp_path / "goodput.jsonl", [first, first | dict(session="b", began=10.0, first=10, step=20, made=10)])
    (tmp_path / "evaluation/held-20").mkdir(parents=True)
    (tmp_path / "evaluation/held-20/confusion.png").write_bytes(b"png")
    scores = dict(task="choice", accuracy=0.25, accuracy_stderr=0.01, examples=9)
    (tmp_path / "evaluation/choice-piqa-20.json").write_text(json.dumps(scores))
    (tmp_path / "evaluation/held-100").mkdir()
    (tmp_path / "evaluation/held-100/confusion.png").write_bytes(b"last png")
    return Workdir(str(tmp_path), primary=False)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')


def test_facts(folder):
    found = told(folder)[0]
    assert found["model"] == "gpt2" and found["steps"] == "20 of 40" and found["held loss"] == "2.0000 nats"
    assert found["tokens seen"] == "41k" and found["goodput"] == "45.0%" and found["aether"] == "0.1"


def test_sections(folder):
    found = {section.name: section for section in told(folder)[1]}
    assert list(found) == ["scores", "samples", "time", "config"]  # no curves were drawn
    held, tasks, picture = found["scores"].items
    assert held.columns == ("step", "loss", "accuracy") and held.rows == ((10, 2.25, 0.5), (20, 2.0, 0.5))
    assert tasks.rows == (("choice-piqa-20", "accuracy", 0.25, 0.01),)
    assert isinstance(picture, Picture) and picture.png == b"last png"
    samples = found["samples"].items
    assert (
        len(samples) == LAST and isinstance(samples[0], Passage) and samples[0].tokens == ((f"words {LAST + 2}", 0.0),)
    )


def test_time_has_every_start(folder):
    section = {section.name: section for section in told(folder)[1]}["time"]
    assert section.text[0].startswith("Goodput 45.0% of 20.0 s: 20 steps, 1 restarts, 10 steps lost")
    shares, starts = section.items
    assert (
        isinstance(shares, Table) and ("compile", 6.0, 30.0) in shares.rows and ("steps lost", 3.0, 15.0) in shares.rows
    )
    assert [row[starts.columns.index("from step")] for row in starts.rows] == [0, 10]
    assert starts.rows[0][starts.columns.index("compile, s")] == 3.0


def test_the_config_begins_with_what_was_set(folder):
    knobs, changes, versions = {section.name: section for section in told(folder)[1]}["config"].items
    changed = {key: value for key, value, default in knobs.rows if default}
    assert changed == {"model.kind": "gpt2", "model.layers": "3", "train.steps": "40", "data.context": "64"}
    assert [row[-1] != "" for row in knobs.rows] == [True] * 4 + [False] * (len(knobs.rows) - 4)
    assert changes.rows == (("now", "train.steps", "20", "40"),) and ("git", "abc") in versions.rows


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        told(Workdir(str(tmp_path), primary=False))


def test_a_ledger_and_telemetry_without_a_whole_line_are_left_out(folder):
    for name in ("goodput.jsonl", "telemetry.jsonl"):
        (folder.local / name).write_text('{"torn')
    facts, sections = told(folder)
    assert "goodput" not in facts and [section.name for section in sections] == ["scores", "samples", "config"]


def test_telemetry_is_drawn(folder):
    lines = [dict(step=s, split="blocks.0.mlp.hidden", alignment=0.5, scale=1.0) for s in (10, 20)]
    write(folder.local / "telemetry.jsonl", lines)
    section = next(section for section in told(folder)[1] if section.name == "telemetry")
    assert section.pictures[0].png.startswith(b"\x89PNG")
