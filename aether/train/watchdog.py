"""The watchdog: a thread that reports when the main one does not get on, in Python or in a collective operation."""

import threading
import time
from collections.abc import Callable

from aether.config import FaultsConfig
from aether.train.activity import BEFORE, PAUSES, STEPS, WAIT, Activity

PAUSE_FACTOR = 5.0  # of its median, after which an evaluation or a checkpoint counts as hanging
UNKNOWN_FACTOR = 10.0  # of `watchdog_seconds`, for a phase that has never ended yet
UNLIMITED = ("start-up", "data")  # texts may take hours to prepare, and other processes have a limit of their own


class Watchdog(threading.Thread):
    """Calls `report(phase, seconds)` when nothing happens for too long, and again after twice as long.

    It counts its own wakings, a poll apart, and not the clock: what stops the whole process, such as a machine that
    sleeps, stops it too. It only reports.
    """

    def __init__(self, activity: Activity, c: FaultsConfig, report: Callable[[str, float], None], poll: float = 1.0):
        super().__init__(name="aether-watchdog", daemon=True)
        self._activity, self._config, self._report = activity, c, report
        self._poll = min(poll, c.watchdog_seconds / 4)
        self._done = threading.Event()

    def limit(self, phase: str) -> float:
        """Return the seconds after which a phase, or a step, counts as hanging."""
        c = self._config
        if phase in UNLIMITED or not c.watchdog_factor:
            return float("inf")
        usual = None if phase in BEFORE else self._activity.usual(STEPS if phase == WAIT else phase)
        if usual is None:
            return UNKNOWN_FACTOR * c.watchdog_seconds
        return max(c.watchdog_seconds, usual * (PAUSE_FACTOR if phase in PAUSES else c.watchdog_factor))

    def run(self) -> None:
        """Watch until `stop`."""
        seen, idle, times = -1, 0.0, 1
        last = time.perf_counter()
        while not self._done.wait(self._poll):
            now = time.perf_counter()
            moment = self._activity.look()
            idle += min(now - last, 2 * self._poll)
            last = now
            if moment.marks != seen:
                seen, idle, times = moment.marks, 0.0, 1
            if idle > times * self.limit(moment.phase):
                times *= 2
                self._report(moment.phase, idle)

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join(timeout=5)
