"""The flight recorder: the last steps in memory, written to the run's folder when something goes wrong."""

import faulthandler
import json
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax

from aether.config import Config
from aether.data.corpus import Corpus
from aether.data.loader import batch_ids
from aether.train.activity import Activity
from aether.workdir import Workdir

NAMED = 20_000  # examples that a dump names at most, those of the newest steps


class Recorder:
    """Holds the last `faults.record_steps` steps of this process; `dump` writes them, each process its own.

    Args:
      config: resolved.
      corpus: names the examples of a batch.
      workdir: takes `flight/process-K-STEP-REASON.jsonl`.
      activity: what this process is doing.
    """

    def __init__(self, config: Config, corpus: Corpus, workdir: Workdir, activity: Activity):
        self._config, self._corpus, self._workdir, self._activity = config, corpus, workdir, activity
        self._steps: deque[tuple[int, int, float, float, Mapping[str, float]]] = deque(
            maxlen=config.faults.record_steps
        )

    def __call__(self, step: int, batch: int, seconds: float, waited: float, metrics: Mapping[str, float]) -> None:
        """Note a step: its number, its batch's, how long it took and how long its data, and its metrics."""
        self._steps.append((step, batch, seconds, waited, metrics))

    def dump(self, reason: str, *, stacks: bool = False) -> list[str]:
        """Write the steps, and with `stacks` what every thread is doing; return the files' names."""
        now = self._activity.look()
        stem = f"flight/process-{jax.process_index()}-{now.step}-{reason}"
        head = dict(reason=reason, process=jax.process_index(), host=socket.gethostname(), pid=os.getpid())
        head |= dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), phase=now.phase, step=now.step)
        lines = [json.dumps(line) + "\n" for line in [head, *self._lines()]]
        files = {f"{stem}.jsonl": "".join(lines).encode()}
        if stacks:
            files[f"{stem}.stacks.txt"] = _stacks()
        return [self._workdir.leave(name, content) for name, content in files.items()]

    def _lines(self) -> list[dict[str, Any]]:
        """Return a line a step, the oldest first; numbers that are not finite as words, since JSON has none."""
        c = self._config
        steps = list(self._steps)
        named = NAMED // c.data.batch_size
        lines = []
        for k, (step, batch, seconds, waited, metrics) in enumerate(steps):
            line: dict[str, Any] = dict(step=step, batch=batch, seconds=round(seconds, 6), data_wait=round(waited, 6))
            line |= {name: value if abs(value) < float("inf") else str(value) for name, value in metrics.items()}
            if len(steps) - k <= named:
                line["ids"] = batch_ids(self._corpus.train, c.data, c.train.seed, batch)
            lines.append(line)
        return lines


def _stacks() -> bytes:
    """Return the stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
