"""What a process is doing, and since when: the one clock that the watchdog and the ledger read."""

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STEPS, WAIT = "steps", "data wait"
START = "start-up"
PAUSES = ("evaluation", "checkpoint")
BEFORE = (START, "data", "init", "compile", "telemetry", "restore")  # phases that come before the first step
KEPT = 101  # durations from which a median is taken


@dataclass(frozen=True)
class Moment:
    """What an `Activity` was doing at one moment.

    Attributes:
      seconds: spent in each phase so far, the present one included.
      marks: changes whenever the process gets on: enters a phase or makes a step.
      longest: (seconds, phase, step) of the longest step, wait or pause.
    """

    phase: str
    step: int
    made: int
    marks: int
    seconds: dict[str, float]
    longest: tuple[float, str, int]


class Activity:
    """The phases of a process and the steps that it makes, by a clock that never jumps.

    Phases are entered by the main thread; others read. A step lasts from the one before, or from the end of a pause;
    waiting for its data is a part of it.
    """

    def __init__(self, started: float):
        self.began = started
        self._lock = threading.Lock()
        self._phase, self._since, self._mark = START, started, started
        self._seconds: dict[str, float] = defaultdict(float)
        self._took: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._longest = (0.0, "", 0)
        self._step = self._made = self._marks = 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Be in a phase, and afterwards in the one before again."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, phase: str) -> str:
        """Change to a phase and return the one that ends."""
        with self._lock:
            now, before = time.perf_counter(), self._phase
            span = now - self._since
            self._seconds[before] += span
            self._phase, self._since = phase, now
            if WAIT not in (before, phase):
                self._mark, self._marks = now, self._marks + 1
            if before in PAUSES:
                self._took[before].append(span)
            if before in PAUSES or before == WAIT:
                self._longest = max(self._longest, (span, before, self._step))
        return before

    def step(self, step: int) -> float:
        """Note that a step is made and return its seconds."""
        with self._lock:
            now = time.perf_counter()
            took, self._mark = now - self._mark, now
            self._step, self._made, self._marks = step, self._made + 1, self._marks + 1
            self._took[STEPS].append(took)
            self._longest = max(self._longest, (took, STEPS, step))
        return took

    def back_to(self, step: int) -> None:
        """Note that the run goes on from a step."""
        with self._lock:
            self._step = step

    def usual(self, phase: str) -> float | None:
        """Return the median of a phase's, or a step's, seconds; None before there was one."""
        with self._lock:
            took = list(self._took[phase])
        return statistics.median(took) if took else None

    def look(self) -> Moment:
        """Return the present moment."""
        with self._lock:
            seconds = dict(self._seconds)
            seconds[self._phase] = seconds.get(self._phase, 0.0) + time.perf_counter() - self._since
            return Moment(self._phase, self._step, self._made, self._marks, seconds, self._longest)
