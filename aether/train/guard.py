"""Who watches a process of a run: the clock of its phases, the flight recorder, the watchdog."""

import sys

import jax

from aether.config import Config
from aether.data.corpus import Corpus
from aether.errors import AetherError
from aether.train.activity import Activity
from aether.train.ledger import GOODPUT, Ledger, line, read
from aether.train.recorder import Recorder
from aether.train.watchdog import Watchdog
from aether.workdir import Workdir


class Guard:
    """Watches a process from when its run's folder may be written until `close`."""

    def __init__(self, config: Config, corpus: Corpus, workdir: Workdir, activity: Activity):
        self.activity = activity
        self._workdir = workdir
        self._ledger: Ledger | None = None
        self.recorder = Recorder(config, corpus, workdir, activity)
        self._watchdog = Watchdog(activity, config.faults, self._hangs)
        if config.faults.watchdog_factor:
            self._watchdog.start()

    def dump(self, reason: str, *, stacks: bool = False) -> str:
        """Write the flight recorder of this process; return where, or why not: a full disk ends no run here."""
        try:
            return " and ".join(self.recorder.dump(reason, stacks=stacks))
        except (OSError, AetherError) as e:
            return f"nowhere ({e})"

    def begin(self, step: int) -> None:
        """Note that the run goes on from a step; process 0 keeps the ledger from now on."""
        self.activity.back_to(step)
        if self._workdir.primary:
            self._ledger = Ledger(self._workdir.file(GOODPUT), self.activity, step)

    def close(self) -> None:
        """End the watch and the ledger."""
        if self._watchdog.is_alive():
            self._watchdog.stop()
        if self._ledger is not None:
            self._ledger.close()
            self._workdir.sync(GOODPUT)

    def goodput(self) -> str:
        """Return the ledger's sum in a line."""
        return line(read(self._workdir.file(GOODPUT))) if self._workdir.primary else ""

    def _hangs(self, phase: str, seconds: float) -> None:
        where = self.dump("hang", stacks=True)
        if jax.process_index() == 0:
            step = self.activity.look().step
            text = (
                f"watchdog: no progress for {seconds:.0f} s, in {phase} after step {step}; each process has written its"
            )
            print(f"{text} stacks and last steps: {where}", file=sys.stderr, flush=True)
