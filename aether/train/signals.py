"""SIGTERM and Ctrl-C: noted, so that a run ends at a step and saves, at the same one on all processes."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aether.train import agree
from aether.train.step import STOP

BETWEEN = 8  # batches of an evaluation, or tokens of a sample, between two questions to the other processes


class Stop:
    """Tells whether SIGTERM or Ctrl-C came: calling it names the signal, or returns "".

    Until it is `patient` a signal interrupts at once: nothing is made yet that could be lost. After that the loop looks
    at it, and only a second Ctrl-C interrupts.

    Where there are several processes, calling it names the signal that they have agreed on: each sends what it has seen
    with its batches (`flags`), the step returns the largest, and all of them read it after the same step (`agreed`);
    between steps they ask each other (`ask`).
    """

    def __init__(self) -> None:
        self.patient = False
        self._several = self._speaks = False
        self._seen = self._agreed = 0
        self._flags: dict[int, jax.Array] = {}

    def begin(self) -> None:
        """Be ready for other processes, once it is known how many there are.

        A process that a signal interrupts alone would leave the others waiting, so that with several it is patient.
        """
        self.patient = self._several = jax.process_count() > 1
        self._speaks = jax.process_index() == 0

    def __call__(self) -> str:
        """Return the name of the signal that stops the run."""
        number = self._agreed if self._several else self._seen
        return signal.Signals(number).name if number else ""

    def flags(self, mesh: Mesh) -> dict[str, jax.Array]:
        """Return what belongs into a batch: one number a device, set by its process; nothing where there is only one.

        It is made anew only when a signal comes.
        """
        if not self._several:
            return {}
        seen = self._seen
        if seen not in self._flags:
            shape, sharding = (mesh.size,), NamedSharding(mesh, P(mesh.axis_names))
            self._flags[seen] = jax.make_array_from_callback(shape, sharding, lambda index: np.full(1, seen, np.int32))
        return {STOP: self._flags[seen]}

    def agreed(self, number: int) -> None:
        """Take the largest of what all processes have seen; 0 is nothing."""
        self._agreed = max(self._agreed, number)

    def ask(self) -> str:
        """Ask the other processes, which all do so now, and return as a call does."""
        if self._several:
            self.agreed(agree.largest(self._seen))
        return self()

    def every_few(self) -> "Patrol":
        """Return a question to be asked of every item of a series, in which the processes confer now and then."""
        return Patrol(self)

    def note(self, number: int, frame: Any) -> None:
        """Take a signal."""
        again, self._seen = bool(self._seen), number
        if not self.patient or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        if self._speaks:  # not through sys.stderr, which this may have interrupted in the middle of a write
            with suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: saving at the end of this step\n".encode())

    @property
    def seen(self) -> str:
        """The name of the signal that came to this process."""
        return signal.Signals(self._seen).name if self._seen else ""


class Patrol:
    """Tells for each item of a series whether to go on, the same on all processes."""

    def __init__(self, stop: Stop):
        self._stop, self._count = stop, 0

    def __call__(self, item: Any) -> bool:
        """Return whether no signal came; several processes ask each other every few items."""
        self._count += 1
        return not (self._stop.ask() if self._count % BETWEEN == 1 else self._stop())


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
