"""`metrics.jsonl`: every number of a run, a JSON object a line, and the curves that come of it."""

import bisect
import io
import json
import math
import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aether.storage import storage_errors, write_atomic

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TELEMETRY = "telemetry.jsonl"  # likewise, its splits the ⵟ layers; `aether.explain.telemetry` says of what numbers
NOT_A_NUMBER = float("nan")

Values = Mapping[str, float | None]


@dataclass
class Curve:
    """The lines of one split, in step order; what is missing or not finite is NaN."""

    steps: array = field(default_factory=lambda: array("q"))
    loss: array = field(default_factory=lambda: array("d"))
    rate: array = field(default_factory=lambda: array("d"))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line's loss and learning rate."""
        self.steps.append(record["step"])
        for column, name in ((self.loss, "loss"), (self.rate, "learning_rate")):
            value = record.get(name)
            column.append(NOT_A_NUMBER if value is None else value)

    def has(self, step: int) -> bool:
        """Say whether there is a line of this step."""
        i = bisect.bisect_left(self.steps, step)
        return i < len(self.steps) and self.steps[i] == step

    def copy(self) -> "Curve":
        """Return a copy that another thread may read."""
        return Curve(self.steps[:], self.loss[:], self.rate[:])


class Metrics:
    """`metrics.jsonl`: each (step, split) once, also over restarts; the curves are kept in memory.

    Opening drops a torn line and every line beyond `start_step`. Floats are written so that they read back equal;
    one that is not finite becomes `null`, and the line lists its name under `nonfinite`.

    Without a path it only remembers.
    """

    def __init__(self, path: Path | None, *, start_step: float = math.inf, write: bool = False) -> None:
        self.curves: dict[str, Curve] = {}
        self.furthest = -1  # the last step of the file as it was found
        self.dropped = 0
        self._path = path
        self._file: io.FileIO | None = None  # opened by the first line
        lines = path.read_bytes().splitlines(keepends=True) if path and path.exists() else []
        kept = [line for line in lines if self._load(line, start_step)]
        self.dropped = len(lines) - len(kept)
        self._write = write and path is not None
        if self._write and path and self.dropped:
            write_atomic(path, b"".join(kept))

    def _load(self, line: bytes, start_step: float) -> bool:
        """Remember a line and say whether it stays."""
        record = _record(line)
        if record is None:
            return False
        self.furthest = max(self.furthest, record["step"])
        if record["step"] > start_step:
            return False
        self.curves.setdefault(record["split"], Curve()).add(record)
        return True

    def add(self, step: int, split: str, values: Mapping[str, float | str | None]) -> None:
        """Remember a line, and write it if this process writes."""
        record: dict[str, Any] = {"step": step, "split": split}
        bad = []
        for name, value in values.items():
            if value is not None and not isinstance(value, int | str):
                value = float(value)
                if not math.isfinite(value):
                    bad.append(name)
                    value = None
            record[name] = value
        if bad:
            record["nonfinite"] = bad
        self.curves.setdefault(split, Curve()).add(record)
        if self._write and self._path:
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            with storage_errors(self._path):
                if self._file is None:
                    self._file = open(self._path, "ab", buffering=0)
                while line:
                    line = line[self._file.write(line) :]

    def has(self, step: int, split: str) -> bool:
        """Say whether there is a line of this step and split."""
        return split in self.curves and self.curves[split].has(step)

    def flush(self) -> None:
        """Return once every line is on the disk."""
        if self._file is not None and self._path:
            with storage_errors(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of metrics, without torn ones; there are none in a file that is not there."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [record for record in map(_record, lines) if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line's record, or None of a torn one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and "split" in record
    return record if whole else None
