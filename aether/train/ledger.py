"""Goodput: where the wall time of a run went, over all its restarts.

`goodput.jsonl` holds snapshots of each session: seconds of every phase since the process began, and the steps made. The
last one of a session counts, so that a kill costs the few seconds since. Durations come from a clock that never jumps;
the date is used for the pauses between sessions alone.
"""

import json
import math
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aether.errors import InputError
from aether.storage import storage_errors
from aether.train.activity import STEPS, WAIT, Activity
from aether.workdir import Workdir

GOODPUT = "goodput.jsonl"
EVERY, SHARE, MOST = 5.0, 0.01, 60.0  # seconds between snapshots: at least, of a session's age, and at most
DOWN, LOST = "down", "steps lost"
ROWS = {  # of the report -> the phases in it
    "start-up": ("start-up", "init"),
    "data preparation": ("data",),
    "compile": ("compile", "telemetry"),
    "restore": ("restore",),
    "data wait": (WAIT,),
    "checkpoint": ("checkpoint",),
    "evaluation": ("evaluation",),
}


class Ledger(threading.Thread):
    """Writes snapshots of a session in the background, and a last one when it is closed; a full disk ends no run here.

    Args:
      path: of `goodput.jsonl`.
      activity: what this process is doing.
      first: the step that the session goes on from.
      every: seconds between snapshots at first.
    """

    def __init__(self, path: Path, activity: Activity, first: int, every: float = EVERY):
        super().__init__(name="aether-ledger", daemon=True)
        self._path, self._activity, self._first, self._every = path, activity, first, every
        self._session = secrets.token_hex(4)
        self._began = time.time() - (time.perf_counter() - activity.began)
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Write until `close`."""
        begin = time.perf_counter()
        self._write()
        while not self._done.wait(max(self._every, min(MOST, SHARE * (time.perf_counter() - begin)))):
            self._write()

    def close(self) -> None:
        """Write the last snapshot and end."""
        if self.is_alive():
            self._done.set()
            self.join()
            self._write()

    def _write(self) -> None:
        now = self._activity.look()
        seconds = {phase: round(s, 3) for phase, s in now.seconds.items()}
        record = dict(session=self._session, began=round(self._began, 3), first=self._first, step=now.step)
        record |= dict(made=now.made, seconds=seconds, longest=[round(now.longest[0], 3), *now.longest[1:]])
        try:
            with storage_errors(self._path), open(self._path, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
        except Exception:  # the run itself says that the disk is full; a ledger is not worth its end
            return


@dataclass(frozen=True)
class Goodput:
    """The sum over a run's sessions, in seconds of wall time.

    Attributes:
      wall: from the first start to the last sign of life.
      seconds: by row: steps that count, steps that were lost, the pauses, the time between sessions.
      steps: updates that the run has got on by.
      lost: updates that were made and then made again, or were undone.
      restarts: sessions after the first.
      longest: (seconds, phase, step) of the longest step, wait or pause.
    """

    wall: float
    seconds: dict[str, float]
    steps: int
    lost: int
    restarts: int
    longest: tuple[float, str, int]

    @property
    def share(self) -> float:
        """Return the goodput: the share of the wall time that went into steps that count."""
        return self.seconds[STEPS] / self.wall if self.wall else math.nan


def read(path: Path) -> Goodput:
    """Sum a ledger up.

    Raises:
      ValueError: there is none, or it holds no session.
    """
    return total(sessions(path))


def report(workdir: str) -> str:
    """Return the table of the run in `workdir`, from its files alone.

    Raises:
      InputError: no run has begun there.
    """
    folder = Workdir(workdir, primary=False)
    try:
        return table(read(folder.local / GOODPUT))
    except ValueError:
        raise InputError(f"{folder.path} has no {GOODPUT}; give the --workdir of a run that has started.") from None


def sessions(path: Path) -> list[dict[str, Any]]:
    """Return the last snapshot of each session, in the order in which they began; a torn line is left out."""
    last: dict[str, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            last[record["session"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(last.values(), key=lambda r: r["began"])


def total(sessions: list[dict[str, Any]]) -> Goodput:
    """Sum the last records of sessions up, in the order in which they began.

    Steps beyond the one that the next session goes on from are lost, and so is their share of the session's step time.
    """
    if not sessions:
        raise ValueError("the ledger holds no session")
    rows = dict.fromkeys([STEPS, LOST, *ROWS, DOWN, "other"], 0.0)
    steps = lost = 0
    longest = (0.0, "", 0)
    for session, after in zip(sessions, [*sessions[1:], None], strict=True):
        spent = session["seconds"]
        # What the next session goes on from was made, even if the last line before a kill does not say so yet.
        useful = (after["first"] if after else session["step"]) - session["first"]
        wasted = max(session["made"] - useful, 0)
        in_vain = spent.get(STEPS, 0.0) * wasted / session["made"] if session["made"] else 0.0
        steps, lost = steps + useful, lost + wasted
        rows[STEPS] += spent.get(STEPS, 0.0) - in_vain
        rows[LOST] += in_vain
        for row, phases in ROWS.items():
            rows[row] += sum(spent.get(phase, 0.0) for phase in phases)
        known = {STEPS, *(phase for phases in ROWS.values() for phase in phases)}
        rows["other"] += sum(s for phase, s in spent.items() if phase not in known)
        if after:
            rows[DOWN] += max(after["began"] - session["began"] - sum(spent.values()), 0.0)
        longest = max(longest, tuple(session["longest"]))
    return Goodput(sum(rows.values()), rows, steps, lost, len(sessions) - 1, longest)


def table(found: Goodput) -> str:
    """Return what `--report` prints."""
    lines = [f"{'where the time went':<20} {'':>12} {'share':>7}"]
    for row, seconds in found.seconds.items():
        if seconds >= 0.05 or row == STEPS:
            lines.append(f"{row:<20} {_clock(seconds):>12} {seconds / found.wall:>7.1%}")
    lines.append(f"{'all':<20} {_clock(found.wall):>12}")
    lines.append(line(found))
    seconds, phase, step = found.longest
    if phase:
        lines.append(f"longest: {seconds:.1f} s, {phase} at step {step}")
    return "\n".join(lines)


def line(found: Goodput) -> str:
    """Return the sum in one line."""
    return (
        f"goodput {found.share:.1%} of {_clock(found.wall)}: {found.steps} steps, {found.restarts} restarts, "
        f"{found.lost} steps lost ({_clock(found.seconds[LOST])})"
    )


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
