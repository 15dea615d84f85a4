"""The checkpoints of a run: save, restore, fall back."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from aether import arrays, storage
from aether.checkpoint import tensors
from aether.checkpoint.home import Home
from aether.checkpoint.record import STATE, make_record, read_record
from aether.checkpoint.together import Together
from aether.checkpoint.writer import Writer, writing
from aether.config import CheckpointConfig
from aether.errors import InputError, StorageError

LAG = 30.0  # seconds that a file which process 0 has read may take to appear on another process of a shared disk

_log = logging.getLogger(__name__).warning


class Checkpoints:
    """The checkpoints of one run: a local folder, `gs://...` or `s3://...`, made at the first save.

    `log` takes one line about a damaged checkpoint. Opening, listing and `restore_params` change nothing, so that a
    run may be read while another process trains it; `save` and `restore` first remove what killed saves left behind.

    Of several processes all call `save`, `restore`, `restore_params` and `close`, in the same order: process 0 decides,
    so that disks which show them different things cannot part them, and an error of one is raised on all. `steps`,
    `latest` and `best` say what the calling process sees.
    """

    def __init__(
        self,
        directory: str,
        config: CheckpointConfig,
        *,
        log: Callable[[str], None] = _log,
    ):
        self._home = Home(directory)
        self.directory = self._home.path
        self._config, self._log = config, log
        self._together = Together()
        self._writer: Writer | None = None
        self._clean = False  # whether what killed saves left behind is removed
        self._left_out = False  # whether the save before was damaged

    def steps(self) -> list[int]:
        """List the complete checkpoints, oldest first."""
        return self._home.steps()

    def latest(self) -> int | None:
        """Return the newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the lowest loss (the newer of equals) among those saved with one, or None."""
        return next(iter(self._home.ranking(self._home.steps())), None)

    def save(self, step: int, state: Any, *, meta: Mapping[str, Any], loss: float | None = None) -> None:
        """Start writing `state`; afterwards it may be donated. A step that is already there stays as it is.

        One that turns out damaged as it is verified is left out, and the log says so; two in a row are an error.

        Raises:
          StorageError: the disk is full or cannot be written; perhaps found only now about the save before.
        """
        self._settle()
        if self._together.ask("main", lambda: step in self._tidied().steps()):
            return
        leaves = {name: arrays.owned(leaf) for name, leaf in arrays.named_leaves(state).items()}
        record = make_record(step, leaves, meta, loss)
        self._writer = self._writer or Writer(self._home, self._together, lambda: self._home.prune(self._config))
        self._writer.start(step, leaves, record)

    def restore(
        self, like: Any, step: int | None = None, *, at_most: int | None = None
    ) -> tuple[Any, dict[str, Any], int]:
        """Read (state, meta, step) into the shapes, dtypes and shardings of `like`.

        By default the newest sound one, no later than `at_most` if that is given; damaged newer ones are renamed
        `damaged-STEP` once it is read. A step asked for is read or refused.

        Raises:
          InputError: no such step, a newer format, or arrays other than those of `like`.
          StorageError: the step asked for, or every one there is, cannot be read.
        """
        self.wait()
        self._together.ask("main", lambda: self._tidied().steps())
        values, meta, found, damaged = self._newest(arrays.named_leaves(like), step, "", at_most)
        if damaged:
            self._together.ask("main", lambda: self._set_aside(damaged))
        return jax.tree.unflatten(jax.tree.structure(like), values), meta, found

    def read(self, like: Any, step: int | None = None) -> tuple[Any, int]:
        """Read (state, step) like `restore`, of a run that may be training: nothing is removed or renamed."""
        values, _, found, _ = self._newest(arrays.named_leaves(like), step, "")
        return jax.tree.unflatten(jax.tree.structure(like), values), found

    def restore_params(
        self, like_params: Any, step: int | None = None, *, part: str = "params"
    ) -> tuple[Any, dict[str, Any], int]:
        """Read (parameters, meta, step) from the arrays under `part` alone; like `restore`, but renames nothing."""
        (params,), meta, found = self._parts({part: like_params}, step)
        return params, meta, found

    def restore_model(
        self, params: Any, extras: Any, step: int | None = None, *, averaged: bool
    ) -> tuple[nnx.State, int]:
        """Read what a model is merged from, and its step.

        Args:
          params: like those that are trained.
          extras: like what else the model holds.
          step: of the checkpoint; the newest by default.
          averaged: read the averages of both.
        """
        parts = {"ema": nnx.merge_state(params, extras)} if averaged else {"params": params, "extras": extras}
        read, _, found = self._parts(parts, step)
        return nnx.merge_state(*read), found

    def _parts(self, likes: dict[str, Any], step: int | None) -> tuple[list[Any], dict[str, Any], int]:
        """Read (values, meta, step) of some parts of a state, each like what is given for it, and nothing else."""
        named = {part: arrays.named_leaves(like) for part, like in likes.items()}
        wanted = {f"{part}/{name}": leaf for part, leaves in named.items() for name, leaf in leaves.items()}
        values, meta, found, _ = self._newest(wanted, step, tuple(f"{part}/" for part in likes))
        left = iter(values)
        return [jax.tree.map(lambda _: next(left), like) for like in likes.values()], meta, found

    def last(self, count: int, step: int | None = None) -> list[int]:
        """Return the newest `count` steps that are no later than `step`, oldest first.

        Raises:
          InputError: there are fewer.
        """
        steps: list[int] = self._together.ask("main", self._home.steps)
        found = [s for s in steps if step is None or s <= step]
        if len(found) < count:
            have = f"{len(found)} ({', '.join(map(str, found))})" if found else "none"
            raise InputError(
                f"{count} checkpoint{'s are' if count > 1 else ' is'} wanted"
                f"{'' if step is None else f' up to step {step}'}, and "
                f"{self.directory} has {have}; ask for fewer, or train with a larger checkpoint.keep_last."
            )
        return found[-count:]

    def before(self, step: int) -> int | None:
        """Return the newest step that is no later than `step`, or None."""
        self._settle()
        found = self._together.ask("main", lambda: [s for s in self._tidied().steps() if s <= step])
        return max(found, default=None)

    def is_sound(self, step: int) -> bool:
        """Return whether the files of a checkpoint are as they were written; object stores are asked for sizes only."""
        try:
            storage.verify(self._home / step, read_record(self._home / step)["files"], sums=not self._home.remote)
        except storage.DamagedError:
            return False
        return True

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints that are newer than `step`: those of steps that are to be made anew."""
        self._settle()

        def drop() -> None:
            with writing(self.directory):
                self._home.drop_after(step)

        self._together.ask("main", drop)

    def _settle(self) -> None:
        """Wait for the save under way; one that was damaged is only told, unless the one before was too."""
        if self._writer is None or not self._writer.busy:
            return
        error = self._writer.wait()
        if error is not None and (self._left_out or not isinstance(error, storage.DamagedError)):
            self._clean = False
            raise error
        self._left_out = error is not None
        if error:
            self._log(str(error))

    def wait(self) -> None:
        """Wait until the save under way is verified and what it replaces is deleted.

        Raises:
          StorageError: it failed, or was damaged and left out.
        """
        error = self._writer.wait() if self._writer else None
        if error is not None:
            self._clean = False
            raise error

    def close(self) -> None:
        """Wait for the save under way and end the writer."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _tidied(self) -> Home:
        """Remove, once and after failures, what killed saves and deletions left behind. Process 0 calls it."""
        if not self._clean:
            with writing(self.directory):
                self._home.sweep()
            self._clean = True
        return self._home

    def _set_aside(self, damaged: list[int]) -> None:
        with writing(self.directory):
            self._home.set_aside(damaged)

    def _newest(
        self, wanted: dict[str, Any], step: int | None, scope: str | tuple[str, ...], at_most: int | None = None
    ) -> tuple[list[Any], dict[str, Any], int, list[int]]:
        """Return (values, meta, step, the damaged steps passed over)."""
        found: list[int] = self._together.ask("main", self._home.steps)
        there = [s for s in found if at_most is None or s <= at_most]
        if not there or (step is not None and step not in there):
            have = f"it has {', '.join(map(str, there))}" if there else "it has none"
            raise InputError(f"There is no checkpoint {'' if step is None else step} in {self.directory}; {have}.")
        if step is not None:
            return *self._load(step, wanted, scope), step, []
        damaged: list[int] = []
        while left := [s for s in there if s not in damaged]:
            try:
                return *self._load(left[-1], wanted, scope), left[-1], damaged
            except storage.DamagedError as e:
                now = self._together.ask("main", self._home.steps)
                there = [s for s in now if at_most is None or s <= at_most]
                if left[-1] in there:  # otherwise another run, which trains, has deleted it since
                    self._log(f"{e} Trying the one before it.")
                    damaged.append(left[-1])
        raise StorageError(f"None of the checkpoints in {self.directory} can be read ({', '.join(map(str, there))}).")

    def _load(
        self, step: int, wanted: dict[str, Any], scope: str | tuple[str, ...]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return (values, meta) of one step; all processes succeed or all raise the same."""
        folder: Any = self._home / step
        with contextlib.ExitStack() as stack:
            if self._home.staged:
                with self._reading(step):
                    folder = stack.enter_context(storage.local_copy(folder))
            record = self._together.ask("main", lambda: self._verified(step, folder, wanted, scope))
            summed = not scope and all(len(f) > 1 for f in record["files"].values())
            values, error = self._read(step, folder / STATE, record["arrays"], wanted, summed)
            self._together.agree("read", error)
        return values, record["meta"]

    def _verified(self, step: int, folder: Any, wanted: dict[str, Any], scope: str | tuple[str, ...]) -> dict[str, Any]:
        """Return the record of a checkpoint that is sound and has what is wanted. Process 0 calls it."""
        with self._reading(step):
            record = read_record(folder)
            arrays.check(record["arrays"], wanted, scope, f"Checkpoint {step} in {self.directory}")
            storage.verify(folder, record["files"], sums=not scope)
        return record

    def _read(
        self, step: int, folder: Any, saved: dict[str, Any], wanted: dict[str, Any], summed: bool
    ) -> tuple[list[Any], Exception | None]:
        """Return (values, error). Where process 0 has found all checksums right, files lag behind or are others."""
        patient = summed and jax.process_index() > 0
        end = time.monotonic() + LAG
        while True:
            try:
                with self._reading(step):
                    return tensors.read(folder, saved, wanted), None
            except storage.DamagedError as e:
                if not patient:
                    return [], e
                if time.monotonic() > end:
                    return [], StorageError(
                        f"Checkpoint {step} in {self.directory} is sound on process 0 but cannot be read here; give "
                        "a workdir that all processes share"
                    )
                time.sleep(1)
            except Exception as e:
                return [], e

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Tell a damaged checkpoint from one that cannot be reached at the moment."""
        try:
            yield
        except InputError:
            raise
        except Exception as e:
            why = storage.one_line(e)
            if storage.is_damage(e):
                raise storage.DamagedError(f"Checkpoint {step} in {self.directory} is damaged ({why}).") from e
            raise StorageError(f"Cannot read checkpoint {step} in {self.directory}: {why}") from e
