"""Saves in the background: each process writes its part, then process 0 verifies the whole and gives it its name.

Orbax has a background writer of its own, whose processes wait 20 minutes at a barrier for one that could not write.
Here each tells how its part went.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax

from aether import arrays, storage
from aether.checkpoint import tensors
from aether.checkpoint.home import Home
from aether.checkpoint.record import STATE, seal, verify
from aether.checkpoint.together import Together
from aether.errors import InputError, StorageError

NICE = 19  # the least that Linux gives; without it the steps beside a save lose several times as much (LOG.md)


class Writer:
    """Writes one state at a time into `home`.

    Args:
      home: the folder of the checkpoints.
      together: the processes.
      pruned: called on process 0 after each checkpoint that is complete; deletes older ones.
    """

    def __init__(self, home: Home, together: Together, pruned: Callable[[], None]):
        self._home, self._together, self._pruned = home, together, pruned
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._stage: Any = None
        if home.staged:
            storage.check_shared(home.path, jax.process_count())
            from etils import epath

            self._stage = epath.Path(tempfile.mkdtemp(prefix="aether-checkpoint-"))

    def start(self, step: int, leaves: dict[str, Any], record: dict[str, Any]) -> None:
        """Begin to write `leaves`, which are this writer's own or, on an accelerator, copied before this returns."""
        copied = threading.Event()
        word = self._together.name  # drawn here: only main threads may
        work = lambda: self._run(step, leaves, record, word, copied)  # noqa: E731
        self._thread = threading.Thread(target=work, name=f"checkpoint-{step}")
        self._thread.start()
        if not all(arrays.on_host(leaf) for leaf in leaves.values()):
            copied.wait()

    @property
    def busy(self) -> bool:
        """Whether a save has begun whose end nobody has waited for."""
        return self._thread is not None

    def wait(self) -> Exception | None:
        """Wait for the save under way; return its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Remove the stage."""
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)

    def _run(self, step: int, leaves: Any, record: dict[str, Any], word: str, copied: threading.Event) -> None:
        """Write a checkpoint; on failure give back its space."""
        yield_cpu()
        folder = self._home.unfinished(step, word) if self._stage is None else self._stage / str(step)
        try:
            self._write(folder, leaves, copied)
            self._together.ask("complete", lambda: self._complete(folder, record))
        except Exception as e:
            self._error = e
            if jax.process_index() == 0:
                with contextlib.suppress(Exception):
                    self._home.sweep()  # it may be complete, and an older one could not be deleted
        finally:
            copied.set()

    def _write(self, folder: Any, leaves: dict[str, Any], copied: threading.Event) -> None:
        """Write this process's part and wait for those of the others; all return, or all raise."""
        error: Exception | None = None
        try:
            futures = tensors.start(folder / STATE, leaves)
            copied.set()
            for future in futures:
                future.result()
        except Exception as e:
            error = StorageError(failure(self._home.path, e))
            error.__cause__ = e
        copied.set()
        self._together.agree("written", error)

    def _complete(self, folder: Any, record: dict[str, Any]) -> None:
        """Make what all have written a checkpoint, once it is verified, and delete those that it replaces."""
        with writing(self._home.path):
            tensors.finish(folder / STATE)
            seal(folder, record, sums=not self._home.remote or self._stage is not None)
            try:
                verify(folder, record)
            except storage.DamagedError as e:
                raise storage.DamagedError(
                    f"Checkpoint {record['step']} was damaged as it was written to {self._home.path} ({e}) and is "
                    "left out; look at the disk. Earlier checkpoints are untouched."
                ) from e
            if self._stage is not None:
                folder = self._upload(folder, record["step"])
            self._home.complete(folder, record["step"])
            self._pruned()

    def _upload(self, folder: Any, step: int) -> Any:
        """Copy a checkpoint from the stage to its place; return that."""
        place = self._home / step
        storage.copy_folder(folder, place)
        folder.rmtree()
        return place


def yield_cpu() -> None:
    """Let this thread, and those that it starts, have the CPU after those of the training; Linux only."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


@contextlib.contextmanager
def writing(path: str) -> Any:
    """Turn what goes wrong with the storage of the checkpoints in `path` into `StorageError`."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except Exception as e:
        raise StorageError(failure(path, e)) from e


def failure(path: str, error: Exception) -> str:
    """Say why checkpoints cannot be written to `path`."""
    if storage.is_full(error):
        return (
            f"No space is left for checkpoints in {path}; free some or choose another workdir. "
            "Earlier checkpoints are untouched."
        )
    return f"Cannot write checkpoints in {path}: {storage.one_line(list(storage.causes(error))[-1])}"
