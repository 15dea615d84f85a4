"""The watchdog by a clock of the test's own: what it calls a hang, how often it says so, and what is none."""

import math
import time
from types import SimpleNamespace

import pytest

from aether.config import FaultsConfig
from aether.train import activity as activities
from aether.train import watchdog as watchdogs
from aether.train.activity import STEPS, WAIT, Activity
from aether.train.watchdog import Watchdog


class Played:
    """An activity and a watchdog over it whose wakings are played: `wakes` yields the seconds to the next one."""

    def __init__(self, monkeypatch, **config):
        self.now, self.reports = 0.0, []
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(activities, "time", clock)
        monkeypatch.setattr(watchdogs, "time", clock)
        self.activity = Activity(0.0)
        c = FaultsConfig(**{"watchdog_seconds": 10.0, **config})
        self.dog = Watchdog(self.activity, c, lambda phase, s: self.reports.append((self.now, phase, s)))

    def steps(self, count, seconds):
        self.activity.enter(STEPS)
        for _ in range(count):
            self.now += seconds
            self.activity.step(self.activity.look().step + 1)

    def watch(self, wakes):
        """Run the watchdog; each item is the seconds that pass before it wakes, or something to call."""
        left = iter(wakes)

        def wait(poll):
            assert poll == 1.0
            for item in left:
                if not callable(item):
                    self.now += item
                    return False
                item()
            return True

        self.dog._done = SimpleNamespace(wait=wait)
        self.dog.run()
        return self.reports


def test_no_step_for_so_many_medians_is_told_and_again_after_twice_as_long(monkeypatch):
    played = Played(monkeypatch)
    played.steps(9, 1.0)
    start = played.now
    told = [(now - start, phase, seconds) for now, phase, seconds in played.watch([1.0] * 100)]
    assert [t[0] for t in told] == [22.0, 42.0, 82.0]  # 20 medians after it has first looked
    assert all(phase == STEPS and seconds == pytest.approx(now - 1.0) for now, phase, seconds in told)


def test_a_wait_for_data_is_part_of_the_step(monkeypatch):
    played = Played(monkeypatch)
    played.steps(9, 1.0)
    told = played.watch([*[1.0] * 15, lambda: played.activity.enter(WAIT), *[1.0] * 15])
    assert [phase for _, phase, _ in told] == [WAIT] and told[0][2] == 21.0


def test_fast_steps_have_a_floor_and_progress_begins_anew(monkeypatch):
    played = Played(monkeypatch)
    played.steps(9, 0.01)
    assert played.dog.limit(STEPS) == 10.0
    assert played.watch([*[1.0] * 9, lambda: played.steps(1, 0.01), *[1.0] * 10]) == []


def test_the_limits_of_phases(monkeypatch):
    played = Played(monkeypatch)
    limit = played.dog.limit
    assert [limit(p) for p in ("start-up", "data")] == [math.inf] * 2
    assert [limit(p) for p in ("compile", "restore", STEPS, WAIT, "evaluation")] == [100.0] * 5
    with played.activity("evaluation"):
        played.now += 30.0
    played.steps(3, 2.0)
    assert limit("evaluation") == 150.0 and limit(STEPS) == limit(WAIT) == 40.0 and limit("compile") == 100.0
    off = Watchdog(played.activity, FaultsConfig(watchdog_factor=0.0), print)
    assert off.limit(STEPS) == math.inf


def test_a_process_that_was_stopped_itself_has_not_hung(monkeypatch):
    """An hour passes between two wakings: the machine slept."""
    played = Played(monkeypatch)
    played.steps(9, 1.0)
    assert played.watch([1.0, 3600.0, 1.0, lambda: played.steps(1, 1.0), *[1.0] * 5]) == []


def test_the_thread_reports_and_ends():
    activity, reports = Activity(time.perf_counter()), []
    activity.enter(STEPS)
    activity.step(1)
    dog = Watchdog(activity, FaultsConfig(watchdog_seconds=0.2), lambda *report: reports.append(report))
    dog.start()
    deadline = time.monotonic() + 30
    while not reports and time.monotonic() < deadline:
        time.sleep(0.02)
    dog.stop()
    assert reports[0][0] == STEPS and reports[0][1] > 0.2 and not dog.is_alive() and dog.daemon
