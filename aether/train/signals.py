"""SIGTERM and Ctrl-C: noted, so that a run ends at a step and saves."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax


class Stop:
    """Tells whether SIGTERM or Ctrl-C came: calling it names the signal, or returns "".

    Until it is `patient` a signal interrupts at once: nothing is made yet that could be lost. After that the loop looks
    at it, and only a second Ctrl-C interrupts.
    """

    def __init__(self) -> None:
        self.patient = False
        self._seen = ""

    def __call__(self) -> str:
        """Return the name of the signal that came."""
        return self._seen

    def note(self, number: int, frame: Any) -> None:
        """Take a signal."""
        again, self._seen = bool(self._seen), signal.Signals(number).name
        if not self.patient or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        if jax.process_index() == 0:  # not through sys.stderr, which this may have interrupted in the middle of a write
            with suppress(OSError):
                os.write(2, f"\n{self._seen}: saving at the end of this step\n".encode())


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note SIGTERM and Ctrl-C instead of dying of them."""
    stop = Stop()
    old = {number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
