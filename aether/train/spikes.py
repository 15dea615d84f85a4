"""Loss spikes: when a loss is one, and which batches a run leaves out after it went back.

A spike is a loss more than `faults.spike_sigma` standard deviations above the mean of the last `faults.spike_window`
losses whose updates were made. The step itself skips its update, so that this is exact whatever the host sees when.
With `faults.spike_action=rewind` the run then also goes back, as Chowdhery et al. did (2022, arXiv 2204.02311, 5.1).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import jax.numpy as jnp
from jax import Array

from aether.train import agree
from aether.workdir import Workdir

LEFT_OUT = "left_out.json"
MARGIN = 5  # steps: a checkpoint nearer to the spike may hold what led to it


def empty_window(size: int) -> Array:
    """Return the window of a run that has made no update."""
    return jnp.full((size,), jnp.nan, jnp.float32)


def is_spike(window: Array, loss: Array, sigma: float) -> Array:
    """Return whether loss > mean + sigma · std of the window; False until the window is full."""
    full = jnp.all(jnp.isfinite(window))
    return full & (loss > jnp.mean(window) + sigma * jnp.std(window))


def pushed(window: Array, loss: Array) -> Array:
    """Return the window with a loss at its end and without its first."""
    return jnp.append(window[1:], loss.astype(window.dtype))


class Rewind(Exception):
    """The loop is to go back from the spike of update `step` to the checkpoint of update `target`."""

    def __init__(self, step: int, target: int):
        super().__init__(f"step {step} to {target}")
        self.step, self.target = step, target


class LeftOut:
    """The batches that a run leaves out: after update `at`, the next `count`; kept in `left_out.json`.

    A pure function from updates to batches, so that a run that is killed, goes on from an older checkpoint or with
    other processes sees the same batches.

    Args:
      entries: pairs [at, count].
      rewinds: how often the run went back.
    """

    def __init__(self, entries: Sequence[Sequence[int]] = (), rewinds: int = 0):
        self.entries = sorted([at, count] for at, count in entries)
        self.rewinds = rewinds

    @classmethod
    def load(cls, workdir: Workdir) -> "LeftOut":
        """Read the run's; several processes take process 0's."""
        return cls(**agree.of_first(lambda: workdir.read_json(LEFT_OUT) if workdir.exists(LEFT_OUT) else {}))

    def batch(self, step: int) -> int:
        """Return the number of the batch that comes after `step` updates, that of update step + 1."""
        return step + sum(count for at, count in self.entries if at <= step)

    def extended(self, target: int, step: int) -> "LeftOut":
        """Return these and the batches of updates target + 1 to `step`."""
        count = self.batch(step - 1) - self.batch(target) + 1
        return LeftOut([*(e for e in self.entries if e[0] <= target), [target, count]], self.rewinds + 1)

    def save(self, workdir: Workdir) -> None:
        """Write them, whole or not at all; on the remote too."""
        workdir.write_json(LEFT_OUT, dict(entries=self.entries, rewinds=self.rewinds))
        workdir.sync(LEFT_OUT)

    def batches(self, read: Callable[[int], Any], step: int) -> Generator[Any, None, None]:
        """Yield the batches of updates step + 1, step + 2, ..., where `read(n)` yields batches n, n + 1, ..."""
        while True:
            ends = [at for at, _ in self.entries if at > step]
            with closing(read(self.batch(step))) as part:
                yield from islice(part, min(ends) - step if ends else None)
            if not ends:
                return
            step = min(ends)
