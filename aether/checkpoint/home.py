"""The folder that a run's checkpoints lie in: which there are, which are kept, what killed processes left behind."""

import os
from typing import Any

from aether import storage
from aether.checkpoint.record import read_record
from aether.config import CheckpointConfig
from aether.errors import InputError

MARKER = "commit_success.txt"  # written last; on object stores it alone tells complete from unfinished
UNFINISHED = (
    "unfinished-",
    "deleted-",
    ".orbax-checkpoint-tmp",
)  # parts of names that killed saves and deletions leave


class Home:
    """A folder of checkpoints, local or remote. Only one process changes it.

    Attributes:
      path: where it is, absolute if local.
      remote: whether it is on an object store, where nothing can be renamed.
      staged: whether it is on one that Orbax writes no arrays to, only to disks and gs://.
      folder: the same as a path of etils.
    """

    def __init__(self, path: str):
        os.environ.setdefault("EPATH_USE_TF", "0")  # where TensorFlow is installed it would read s3://, and cannot
        from etils import epath

        self.remote = "://" in path
        self.staged = path.startswith("s3://")
        self.path = path if self.remote else os.path.abspath(os.path.expanduser(path))
        self.folder: Any = epath.Path(self.path)
        self._losses: dict[int, float | None] = {}

    def __truediv__(self, step: int) -> Any:
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """List the complete checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        found = [p for p in self.folder.iterdir() if p.name.isdecimal()]
        return sorted(int(p.name) for p in found if not self.remote or (p / MARKER).exists())

    def ranking(self, steps: list[int]) -> list[int]:
        """Return the steps that were saved with a loss, the best first and the newer of equals."""
        for step in steps:
            if step not in self._losses:
                try:
                    self._losses[step] = read_record(self / step).get("loss")
                except (storage.DamagedError, InputError):
                    self._losses[step] = None
        ranked = [(loss, -step) for step in steps if (loss := self._losses[step]) is not None]
        return [-negative for _, negative in sorted(ranked)]

    def unfinished(self, step: int, word: str) -> Any:
        """Return where a checkpoint is written until it is `complete`; `word` tells processes that write it apart."""
        return self / step if self.remote else self.folder / f"unfinished-{step}-{word}"

    def complete(self, written: Any, step: int) -> None:
        """Make a checkpoint out of what was written."""
        if self.remote:
            (written / MARKER).write_text("complete\n")
        else:
            written.rename(self / step)
            storage.settle(self.folder)

    def prune(self, c: CheckpointConfig) -> None:
        """Delete what the config does not keep."""
        steps = self.steps()
        keep = set(steps[-c.keep_last :]) | set(self.ranking(steps)[: c.keep_best])
        for step in steps:
            if step not in keep and not (c.keep_every and step % c.keep_every == 0):
                self.delete(self / step)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints that are newer than `step`."""
        for newer in [s for s in self.steps() if s > step]:
            self.delete(self / newer)
            self._losses.pop(newer, None)

    def delete(self, folder: Any) -> None:
        """Delete a checkpoint so that at no moment a part of it looks like a whole."""
        if self.remote:
            (folder / MARKER).unlink(missing_ok=True)
        elif folder.name.isdecimal():
            folder = folder.rename(folder.parent / f"deleted-{folder.name}")
        folder.rmtree(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed saves and deletions left behind."""
        for folder in list(self.folder.iterdir()) if self.folder.exists() else []:
            unmarked = self.remote and folder.name.isdecimal() and not (folder / MARKER).exists()
            if unmarked or any(part in folder.name for part in UNFINISHED):
                self.delete(folder)

    def set_aside(self, steps: list[int]) -> None:
        """Rename damaged checkpoints `damaged-STEP`."""
        for step in steps:
            aside = self.folder / f"damaged-{step}"
            if aside.exists():
                aside.rmtree()
            if (self / step).exists():
                (self / step).rename(aside)
            self._losses.pop(step, None)
