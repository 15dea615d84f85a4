"""The ⵟ units of a network while it trains, every so many steps."""

from typing import Any

import jax

from aether.train.meter import divides
from aether.train.report import Reporter
from aether.train.setup import Run
from aether.train.step import Batch


class Telemetry:
    """Looks at the batch of every `train.telemetry_every`th step with the parameters after it, and reports a step late.

    Late, so that neither the host waits for the devices nor they for it.
    """

    def __init__(self, run: Run, reporter: Reporter):
        self.units, self.every, self.reporter = run.units, run.config.train.telemetry_every, reporter
        self.late: tuple[int, jax.Array] | None = None

    def __call__(self, step: int, state: Any, batch: Batch) -> None:
        """Report the look before, and take another if step `step`, just made, is one of those."""
        self.finish()
        if self.units is not None and divides(self.every, step):
            self.late = step, self.units(state, batch)

    def finish(self) -> None:
        """Report what is still late."""
        if self.units is not None and self.late is not None:
            (step, numbers), self.late = self.late, None
            self.reporter.units(step, self.units.fetched(numbers))
