"""The clock of a process's phases: nothing is lost or counted twice, and what a step lasts."""

import time
from types import SimpleNamespace

import pytest

from aether.train import activity
from aether.train.activity import KEPT, START, STEPS, WAIT, Activity


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(activity, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_every_second_is_in_one_phase(clock):
    a = Activity(90.0)
    clock.now = 103.0
    with a("compile"):
        clock.now += 5.0
        with a("data"):
            clock.now += 2.0
        clock.now += 1.0
    a.enter(STEPS)
    clock.now += 4.0
    seen = a.look()
    assert seen.seconds == {START: 13.0, "compile": 6.0, "data": 2.0, STEPS: 4.0} and seen.phase == STEPS
    assert sum(seen.seconds.values()) == clock.now - a.began


def test_a_step_lasts_from_the_one_before_or_from_the_end_of_a_pause(clock):
    a = Activity(clock.now)
    clock.now += 50.0
    a.enter(STEPS)
    with a(WAIT):
        clock.now += 1.0
    clock.now += 2.0
    assert a.step(1) == 3.0  # its data included, the start-up not
    clock.now += 4.0
    assert a.step(2) == 4.0
    with a("evaluation"):
        clock.now += 30.0
    clock.now += 5.0
    assert a.step(3) == 5.0
    assert a.usual(STEPS) == 4.0 and a.usual("evaluation") == 30.0 and a.usual("checkpoint") is None
    seen = a.look()
    assert seen.longest == (30.0, "evaluation", 2) and (seen.step, seen.made) == (3, 3)


def test_the_median_is_of_the_last_steps(clock):
    a = Activity(clock.now)
    for step in range(2 * KEPT):
        clock.now += 1.0 if step < KEPT else 7.0
        a.step(step)
    assert a.usual(STEPS) == 7.0


def test_waiting_for_data_is_no_progress_but_a_step_and_a_phase_are(clock):
    a = Activity(clock.now)
    a.enter(STEPS)
    before = a.look().marks
    with a(WAIT):
        assert a.look().marks == before
    assert a.look().marks == before
    a.step(1)
    assert a.look().marks == before + 1
    with a("checkpoint"):
        assert a.look().marks == before + 2


def test_a_phase_ends_when_it_raises():
    a = Activity(time.perf_counter())
    with pytest.raises(ValueError, match="bad"), a("compile"):
        raise ValueError("bad")
    assert a.look().phase == START


def test_steps_undone(clock):
    a = Activity(clock.now)
    a.step(7)
    a.back_to(3)
    assert (a.look().step, a.look().made) == (3, 1)
