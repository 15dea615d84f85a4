"""A profiler trace of some steps."""

from typing import Any, Self

import jax

from aether.train.setup import Run, say


class Profiler:
    """Writes a trace of the steps a + 1 … b to the workdir when `train.profile_steps` is "a:b"."""

    def __init__(self, run: Run):
        self.folder = str(run.workdir.file("profile"))
        self.span = run.config.train.profile_span()
        self.active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, step: int, state: Any) -> None:
        """Start or stop before update `step` + 1 is made; `state` is waited for, lest a step be cut in two."""
        if self.active != (step in self.span):
            jax.block_until_ready(state)
            if self.active:
                self._stop()
            else:
                jax.profiler.start_trace(self.folder)
                self.active = True

    def _stop(self) -> None:
        if self.active:
            jax.profiler.stop_trace()
            self.active = False
            say(f"trace of steps {self.span.start + 1} to {self.span.stop} in {self.folder}")
