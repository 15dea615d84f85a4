"""The flight recorder: what a dump holds, and that a disk without room ends no run."""

import json
import os
import threading
import time

import pytest

from aether.config import build
from aether.data.corpus import load_corpus
from aether.data.loader import batch_ids
from aether.testing import tiny_text
from aether.train.activity import STEPS, Activity
from aether.train.guard import Guard
from aether.train.recorder import Recorder
from aether.workdir import Workdir


@pytest.fixture
def guard(tmp_path):
    """A guard without a watchdog over a corpus of one text."""
    config = build(
        dict(
            data=dict(path=str(tiny_text(tmp_path)), context=16, batch_size=4),
            faults=dict(record_steps=5, watchdog_factor=0.0),
        )
    )
    corpus = load_corpus(config.data)
    activity = Activity(time.perf_counter())
    activity.enter(STEPS)
    return Guard(config.resolved(257), corpus, Workdir(str(tmp_path / "run"), primary=True), activity)


def note(guard, count, **metrics):
    for step in range(1, count + 1):
        guard.activity.step(step)
        guard.recorder(step, step + 2, 0.25, 0.125, dict(loss=step / 2, **metrics))


def test_the_last_steps_with_their_batches(guard, tmp_path):
    note(guard, 8, grad_norm=float("nan"), update_norm=float("-inf"))
    where = guard.dump("nonfinite")
    (file,) = (tmp_path / "run" / "flight").iterdir()
    assert file.name == "process-0-8-nonfinite.jsonl" and str(file) in where

    def strict(word):
        raise AssertionError(f"{word} is not JSON")

    head, *steps = [json.loads(line, parse_constant=strict) for line in file.read_text().splitlines()]
    assert (head["reason"], head["process"], head["phase"], head["step"]) == ("nonfinite", 0, STEPS, 8)
    assert head["pid"] == os.getpid() and head["host"] and head["time"][:2] == "20"
    assert [line["step"] for line in steps] == [4, 5, 6, 7, 8] and [line["loss"] for line in steps][-1] == 4.0
    assert steps[0]["grad_norm"] == "nan" and steps[0]["update_norm"] == "-inf"
    assert steps[0]["seconds"] == 0.25 and steps[0]["data_wait"] == 0.125
    recorder: Recorder = guard.recorder
    c = recorder._config
    for line in steps:
        assert line["batch"] == line["step"] + 2
        assert (
            line["ids"] == batch_ids(recorder._corpus.train, c.data, c.train.seed, line["batch"])
            and len(line["ids"]) == 4
        )


def test_the_stacks_of_all_threads(guard, tmp_path):
    held = threading.Event()

    def lost_in_thought():
        held.wait(30)

    thread = threading.Thread(target=lost_in_thought)
    thread.start()
    try:
        guard.dump("hang", stacks=True)
    finally:
        held.set()
        thread.join()
    names = sorted(file.name for file in (tmp_path / "run" / "flight").iterdir())
    assert names == ["process-0-0-hang.jsonl", "process-0-0-hang.stacks.txt"]
    stacks = (tmp_path / "run" / "flight" / names[1]).read_text()
    assert "lost_in_thought" in stacks and "test_the_stacks_of_all_threads" in stacks


def test_a_dump_without_room_says_so(guard, tmp_path):
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "flight").write_text("a file where a folder should be")
    assert guard.dump("spike").startswith("nowhere (")
