"""From the metrics of steps to lines: losses, rates, and complaints about steps that are not finite."""

import time
from collections.abc import Callable
from typing import Any

import jax

from aether.data.loader import batch_ids
from aether.errors import CheckError
from aether.train.activity import WAIT
from aether.train.flops import flops_per_step, peak_flops
from aether.train.report import Reporter
from aether.train.setup import Run
from aether.train.signals import Stop
from aether.train.spikes import MARGIN, Rewind
from aether.train.step import STOP


def divides(every: int, step: int) -> bool:
    """Return whether something that happens `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


class Meter:
    """Turns the metrics of steps into lines, on accelerators one step late so that they never wait for the host.

    Adds `tokens_per_second` or `images_per_second`, `mfu` and `data_wait` (share of the time) over the steps since the
    line before; pauses for evaluations and saves do not count.
    """

    def __init__(self, run: Run, reporter: Reporter, stop: Stop):
        self.run, self.reporter, self.stop = run, reporter, stop
        peak = peak_flops(list(run.mesh.devices.flat))
        self.flops_share = flops_per_step(run.config) / run.config.per_step / peak if peak else None
        self.late: tuple[int, dict[str, jax.Array]] | None = None
        # On a CPU a step may be done when its call returns: reading late would date it to the step after.
        self.at_once = run.mesh.devices.flat[0].platform == "cpu"

    def begin(self) -> None:
        """Start the clock, at first or after a pause."""
        self.clock, self.waited, self.last_wait, self.steps = time.perf_counter(), 0.0, 0.0, 0

    def waiting(self, function: Callable, *args: Any) -> Any:
        """Call a function and count its time as waiting for data."""
        begin = time.perf_counter()
        with self.run.guard.activity(WAIT):
            result = function(*args)
        self.last_wait = time.perf_counter() - begin
        self.waited += self.last_wait
        return result

    def __call__(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step, and report those of the step before."""
        self.finish()
        self.late = step, metrics
        if self.at_once:
            self.finish()

    def finish(self) -> None:
        """Report what is still late."""
        if self.late is None:
            return
        (step, late), self.late = self.late, None
        metrics: dict[str, float] = {k: v.item() for k, v in jax.device_get(late).items()}
        self.steps += 1
        seconds = self.run.guard.activity.step(step)
        self.run.guard.recorder(step, self.run.left_out.batch(step - 1), seconds, self.last_wait, metrics)
        self.stop.agreed(int(metrics.pop(STOP, 0)))
        in_a_row = int(metrics.pop("skipped_in_a_row"))
        every, last = self.run.config.train.log_every, self.run.config.train.steps
        if in_a_row or step == last or divides(every, step):
            self._report(step, metrics)
        if in_a_row:
            self._complain(step, in_a_row, bool(metrics.get("spike")))

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        seconds = time.perf_counter() - self.clock
        rate = self.steps * self.run.config.per_step / seconds
        mfu = None if self.flops_share is None else rate * self.flops_share
        rates = {f"{self.run.config.unit}_per_second": rate, "mfu": mfu, "data_wait": self.waited / seconds}
        self.reporter.train(step, metrics | rates)
        self.begin()

    def _complain(self, step: int, in_a_row: int, spike: bool) -> None:
        c, what = self.run.config, "is a spike" if spike else "or gradient is not finite"
        kept = ""
        if in_a_row == 1:
            kept = f"; the last steps are in {self.run.guard.dump('spike' if spike else 'nonfinite', stacks=True)}"
        self.reporter.say(f"step {step}: the loss {what}; update skipped ({in_a_row} in a row){kept}")
        if in_a_row >= c.train.max_skipped:
            self._give_up(step, in_a_row)
        if spike and c.faults.spike_action == "rewind":
            self._go_back(step)

    def _go_back(self, step: int) -> None:
        target = self.run.checkpoints.before(step - MARGIN)
        if target is None:
            self.reporter.say(f"there is no checkpoint {MARGIN} steps before it to go back to; going on")
            return
        c, made = self.run.config.faults, self.run.left_out.rewinds
        if made >= c.max_rewinds:
            raise CheckError(
                f"Step {step} is a spike (faults.spike_sigma is {c.spike_sigma}) and the run has gone back {made} "
                f"times (faults.max_rewinds is {c.max_rewinds}); lower optim.learning_rate, or raise one of them."
            )
        raise Rewind(step, target)

    def _give_up(self, step: int, in_a_row: int) -> None:
        c, batch = self.run.config, self.run.left_out.batch
        self.reporter.flush()
        steps = range(step - in_a_row, step)
        ids = [
            f"step {s + 1}: {named(batch_ids(self.run.corpus.train, c.data, c.train.seed, batch(s)))}" for s in steps
        ]
        what = "were not finite or spikes" if c.faults.spike_sigma else "were not finite"
        raise CheckError(
            f"{in_a_row} steps in a row {what} (train.max_skipped is {c.train.max_skipped}); lower "
            f"optim.learning_rate or look at these batches (set:example): {'; '.join(ids)}."
        )


def named(ids: list[str], most: int = 16) -> str:
    """Put the first few names in a row."""
    return " ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
