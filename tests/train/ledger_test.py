"""The goodput ledger: sums over sessions by hand, torn files, a session as it is written, a killed one."""

import json
import subprocess
import sys
import time

import pytest

from aether.errors import InputError
from aether.train.activity import STEPS, WAIT, Activity
from aether.train.ledger import DOWN, GOODPUT, LOST, Ledger, line, read, report, table, total


def session(began, first, step, made, name="a", **seconds):
    seconds = {phase.replace("_", " "): s for phase, s in seconds.items()}
    return dict(session=name, began=began, first=first, step=step, made=made, seconds=seconds, longest=[2.0, STEPS, 3])


def test_the_sum_over_a_kill_by_hand():
    """20 steps in 40 s, saved at 15, killed; 30 s later on from 15 to 40: 5 steps and 10 s lost."""
    first = session(1000.0, 0, 20, 20, steps=40.0, compile=8.0, checkpoint=2.0)
    second = session(1080.0, 15, 40, 25, "b", steps=50.0, data_wait=1.0, restore=4.0)
    found = total([first, second])
    assert (found.steps, found.lost, found.restarts) == (40, 5, 1)
    assert found.seconds[STEPS] == 80.0 and found.seconds[LOST] == 10.0 and found.seconds[DOWN] == 30.0
    assert found.seconds["data wait"] == 1.0 and found.seconds["restore"] == 4.0
    assert found.wall == pytest.approx(135.0) and found.share == pytest.approx(80 / 135)
    assert "5 steps lost (10.0 s)" in line(found) and "59.3% of 0:02:15" in line(found)
    assert "restore" in table(found) and "evaluation" not in table(found)


def test_steps_undone_within_a_session_are_lost():
    found = total([session(0.0, 10, 30, 26, steps=52.0)])  # went back by 6 steps
    assert (found.steps, found.lost) == (20, 6) and found.seconds[LOST] == pytest.approx(12.0)


def test_a_session_killed_before_its_first_step_loses_time_alone():
    found = total([session(0.0, 10, 10, 0, compile=5.0), session(9.0, 10, 12, 2, "b", steps=1.0)])
    assert (found.steps, found.lost, found.restarts) == (2, 0, 1) and found.seconds[DOWN] == 4.0


def test_steps_made_after_the_last_line_before_a_kill_count():
    found = total([session(0.0, 0, 35, 35, steps=5.0), session(20.0, 60, 200, 140, "b", steps=14.0)])
    assert (found.steps, found.lost) == (200, 0) and found.seconds[STEPS] == 19.0


def test_a_clock_set_back_between_sessions_takes_no_time_off():
    found = total([session(100.0, 0, 5, 5, steps=50.0), session(110.0, 5, 6, 1, "b", steps=1.0)])
    assert found.seconds[DOWN] == 0.0 and found.wall == 51.0


def test_a_session_as_it_is_written(tmp_path):
    path, activity = tmp_path / "goodput.jsonl", Activity(time.perf_counter() - 2.0)
    ledger = Ledger(path, activity, 4, every=0.02)
    activity.back_to(4)
    activity.enter(STEPS)
    for step in (5, 6):
        with activity(WAIT):
            time.sleep(0.05)
        activity.step(step)
    with activity("evaluation"):
        time.sleep(0.1)
    ledger.close()
    assert len(path.read_bytes().splitlines()) > 3
    with path.open("ab") as file:
        file.write(b'{"session": "torn", "beg')
    found = read(path)
    assert (found.steps, found.lost, found.restarts) == (2, 0, 0)
    assert found.seconds["start-up"] >= 2.0 and found.seconds["data wait"] >= 0.1
    assert found.seconds["evaluation"] >= 0.1 and found.seconds["other"] == 0.0
    assert found.wall == pytest.approx(time.perf_counter() - activity.began, abs=1.0)


def test_a_ledger_without_sessions_is_an_error(tmp_path):
    (tmp_path / "goodput.jsonl").write_bytes(b"not json\n")
    with pytest.raises(ValueError, match="no session"):
        read(tmp_path / "goodput.jsonl")


def test_the_report_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="has no goodput.jsonl; give the --workdir of a run that has started"):
        report(str(tmp_path))
    (tmp_path / GOODPUT).write_text(json.dumps(session(0.0, 0, 5, 5, steps=50.0)) + "\n")
    assert "goodput 100.0% of 50.0 s: 5 steps, 0 restarts" in report(str(tmp_path))


def test_what_a_killed_process_wrote_counts(tmp_path):
    code = f"""
import os, pathlib, time
from aether.train.activity import STEPS, Activity
from aether.train.ledger import Ledger
activity = Activity(time.perf_counter())
Ledger(pathlib.Path({str(tmp_path / "goodput.jsonl")!r}), activity, 0, every=0.05)
activity.enter(STEPS)
for step in range(1, 8):
    activity.step(step)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    found = read(tmp_path / "goodput.jsonl")
    assert found.steps == 7 and found.seconds[STEPS] > 0.3


def test_a_full_disk_ends_no_run(tmp_path):
    ledger = Ledger(tmp_path / "no such folder" / "goodput.jsonl", Activity(time.perf_counter()), 0)
    ledger.close()
    assert not ledger.is_alive()
