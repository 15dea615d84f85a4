"""Checkpoints: the training state as named arrays in numbered folders, which Orbax writes in the background.

A folder `STEP/` holds `state/` (Orbax's arrays, under names made from tree paths, so that no class of Flax or Optax is
part of the format) and `meta.json`: format version, loss, the arrays, the files with their sizes and checksums (Orbax
reads a flipped bit as a number like any other), and what the caller gave.
On disks an unfinished folder has another name and is renamed when complete; on object stores a marker is written last.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aether import arrays, storage
from aether.config import CheckpointConfig
from aether.errors import InputError, StorageError

FORMAT = 1
META = "meta.json"
MARKER = "commit_success.txt"  # Orbax writes it last; on object stores it alone tells complete from unfinished
UNFINISHED = (".orbax-checkpoint-tmp", "deleted-")  # parts of names that killed saves and deletions leave behind

# Format n -> what turns the record (the content of meta.json) of format n into one of n + 1. An array is renamed by
# moving its entry in record["arrays"]; "key" in the entry goes on naming it on disk.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_log = logging.getLogger(__name__).warning


class Checkpoints:
    """The checkpoints of one run: a local folder, `gs://...` or `s3://...`, made at the first save.

    `log` takes one line about a damaged checkpoint. Opening, listing and `restore_params` change nothing, so that a
    run may be read while another process trains it; `save` and `restore` first remove what killed saves left behind.
    """

    def __init__(
        self,
        directory: str,
        config: CheckpointConfig,
        *,
        log: Callable[[str], None] = _log,
    ):
        from etils import epath

        self.directory = directory if "://" in directory else os.path.abspath(os.path.expanduser(directory))
        self._home: Any = epath.Path(self.directory)
        self._remote = "://" in directory
        self._staged = directory.startswith("s3://")  # Orbax writes arrays to disks and gs:// only
        self._stage: Any = None
        self._config = config
        self._log = log
        self._writer: Any = None
        self._cleaned = False
        self._losses: dict[int, float | None] = {}
        self._saving: dict[str, Any] = {}

    def steps(self) -> list[int]:
        """List the complete checkpoints, oldest first."""
        if not self._home.exists():
            return []
        found = [p for p in self._home.iterdir() if p.name.isdecimal()]
        return sorted(int(p.name) for p in found if not self._remote or (p / MARKER).exists())

    def latest(self) -> int | None:
        """Return the newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the lowest loss (the newer of equals) among those saved with one, or None."""
        return next(iter(self._ranking(self.steps())), None)

    def save(self, step: int, state: Any, *, meta: Mapping[str, Any], loss: float | None = None) -> None:
        """Start writing `state`; afterwards it may be donated. A step that is already there stays as it is.

        Raises:
          StorageError: the disk is full or cannot be written; perhaps found only now about the save before.
        """
        self.wait()
        self._clean()
        if step in self.steps():
            return
        leaves = {name: arrays.owned(leaf) for name, leaf in arrays.named_leaves(state).items()}
        record = {
            "format": FORMAT,
            "step": step,
            "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
            "arrays": {k: {"key": k, "shape": list(v.shape), "dtype": str(v.dtype)} for k, v in leaves.items()},
            "meta": dict(meta),
        }
        json.dumps(record)  # what JSON cannot hold is the caller's mistake: say so here, not in the writer's thread
        with self._writing():
            self._write(step, leaves, record)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
        """Read (state, meta, step) into the shapes, dtypes and shardings of `like`; by default the newest sound one.

        A damaged newest one is renamed `damaged-STEP` once an older one is read. A step asked for is read or refused.

        Raises:
          InputError: no such step, a newer format, or arrays other than those of `like`.
          StorageError: the step asked for, or every one there is, cannot be read.
        """
        self.wait()
        self._clean()
        values, meta, found, damaged = self._newest(arrays.named_leaves(like), step, "")
        if damaged:
            with self._writing():
                self._set_aside(damaged)
        return jax.tree.unflatten(jax.tree.structure(like), values), meta, found

    def restore_params(
        self, like_params: Any, step: int | None = None, *, part: str = "params"
    ) -> tuple[Any, dict[str, Any], int]:
        """Read (parameters, meta, step) from the arrays under `part` alone; like `restore`, but renames nothing."""
        wanted = {f"{part}/{name}": leaf for name, leaf in arrays.named_leaves(like_params).items()}
        values, meta, found, _ = self._newest(wanted, step, f"{part}/")
        return jax.tree.unflatten(jax.tree.structure(like_params), values), meta, found

    def wait(self) -> None:
        """Wait for the save under way, then delete what the config does not keep."""
        if self._writer is None:
            return
        with self._writing():
            self._writer.wait_until_finished()
            self._prune()

    def close(self) -> None:
        """Wait for the save under way and end the writer."""
        if self._writer is None:
            return
        try:
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            writer.close()
            if self._stage:
                shutil.rmtree(self._stage, ignore_errors=True)

    def _write(self, step: int, leaves: dict[str, Any], record: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        if self._staged and jax.process_count() > 1:
            raise InputError(
                f"The workdir is on s3:// ({self.directory}) and the run has {jax.process_count()} processes; "
                "several processes write to gs:// or to a shared file system."
            )
        if self._writer is None:
            self._open()
        self._saving = record
        root = self._stage if self._staged else self._home
        self._writer.save(root / str(step), args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves)))

    def _open(self) -> None:
        import orbax.checkpoint as ocp
        from etils import epath

        _silence_orbax()
        if self._staged:
            self._stage = epath.Path(tempfile.mkdtemp(prefix="aether-checkpoint-"))
        elif jax.process_index() == 0:
            self._home.mkdir(parents=True, exist_ok=True)
        handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler())
        self._writer = ocp.AsyncCheckpointer(
            handler, async_options=ocp.AsyncOptions(post_finalization_callback=self._finish)
        )

    def _finish(self) -> None:
        """Add meta.json to the arrays. Orbax calls it on process 0, in the writer's thread, before it commits."""
        record = self._saving
        root, name = self._stage if self._staged else self._home, str(record["step"])
        (folder,) = [p for p in root.iterdir() if p.name.split(".")[0] == name]
        sums = not self._remote or self._staged  # object stores keep checksums themselves
        files = {str(p.relative_to(folder)): storage.fingerprint(p, sums) for p in storage.files_of(folder / "state")}
        (folder / META).write_text(json.dumps({**record, "files": files}))
        if self._staged:
            storage.copy_folder(folder, self._home / name)
            (self._home / name / MARKER).write_text("complete\n")

    def _prune(self) -> None:
        if self._staged:
            for copy in self._stage.iterdir():
                copy.rmtree()
        if jax.process_index() != 0:
            return
        steps, c = self.steps(), self._config
        keep = set(steps[-c.keep_last :]) | set(self._ranking(steps)[: c.keep_best])
        for step in steps:
            if step not in keep and not (c.keep_every and step % c.keep_every == 0):
                self._delete(self._home / str(step))

    def _delete(self, folder: Any) -> None:
        """Delete a checkpoint so that at no moment a part of it looks like a whole."""
        if self._remote:
            (folder / MARKER).unlink(missing_ok=True)
        elif folder.name.isdecimal():
            folder = folder.rename(folder.parent / f"deleted-{folder.name}")
        folder.rmtree(missing_ok=True)

    def _clean(self) -> None:
        """Remove, once, what killed saves and deletions left behind."""
        if self._cleaned:
            return
        self._cleaned = True
        if jax.process_index() == 0 and self._home.exists():
            with self._writing():
                self._sweep()

    def _sweep(self) -> None:
        for folder in list(self._home.iterdir()):
            unmarked = self._remote and folder.name.isdecimal() and not (folder / MARKER).exists()
            if unmarked or any(part in folder.name for part in UNFINISHED):
                self._delete(folder)

    def _set_aside(self, damaged: list[int]) -> None:
        if jax.process_index() == 0:
            for step in damaged:
                aside = self._home / f"damaged-{step}"
                if aside.exists():
                    aside.rmtree()
                (self._home / str(step)).rename(aside)
                self._losses.pop(step, None)
        _everywhere(True)

    def _ranking(self, steps: list[int]) -> list[int]:
        """Return the steps that were saved with a loss, the best first."""
        for step in steps:
            if step not in self._losses:
                try:
                    self._losses[step] = self._record(self._home / str(step)).get("loss")
                except (storage.DamagedError, InputError):
                    self._losses[step] = None
        ranked = [(loss, -step) for step in steps if (loss := self._losses[step]) is not None]
        return [-negative for _, negative in sorted(ranked)]

    def _newest(
        self, wanted: dict[str, Any], step: int | None, scope: str
    ) -> tuple[list[Any], dict[str, Any], int, list[int]]:
        """Return (values, meta, step, the damaged steps passed over)."""
        there = self.steps()
        if not there or (step is not None and step not in there):
            have = f"it has {', '.join(map(str, there))}" if there else "it has none"
            raise InputError(f"There is no checkpoint {'' if step is None else step} in {self.directory}; {have}.")
        if step is not None:
            return *self._load(step, wanted, scope), step, []
        damaged: list[int] = []
        for candidate in reversed(there):
            try:
                return *self._load(candidate, wanted, scope), candidate, damaged
            except storage.DamagedError as e:
                self._log(f"{e} Trying the one before it.")
                damaged.append(candidate)
        raise StorageError(f"None of the checkpoints in {self.directory} can be read ({', '.join(map(str, there))}).")

    def _load(self, step: int, wanted: dict[str, Any], scope: str) -> tuple[list[Any], dict[str, Any]]:
        """Return (values, meta) of one step; all processes succeed or all raise."""
        error: Exception | None = None
        result: Any = None
        try:
            folder = self._home / str(step)
            with storage.local_copy(folder) if self._staged else contextlib.nullcontext(folder) as folder:
                record = self._record(folder)
                arrays.check(record["arrays"], wanted, scope, f"Checkpoint {step} in {self.directory}")
                if jax.process_index() == 0:
                    storage.verify(folder, record["files"], sums=not scope)
                result = _read(folder / "state", record["arrays"], wanted), record["meta"]
        except InputError:
            raise
        except Exception as e:
            if not storage.is_damage(e):
                raise StorageError(f"Cannot read checkpoint {step} in {self.directory}: {storage.one_line(e)}") from e
            error = e
        if not _everywhere(error is None):
            why = storage.one_line(error) if error else "another process could not read its part"
            raise storage.DamagedError(f"Checkpoint {step} in {self.directory} is damaged ({why}).") from error
        return result

    def _record(self, folder: Any) -> dict[str, Any]:
        """Read meta.json, brought to the present format."""
        try:
            record = json.loads((folder / META).read_text())
            version = int(record["format"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as e:
            raise storage.DamagedError(f"{folder}/{META} cannot be read: {storage.one_line(e)}") from e
        if version > FORMAT:
            raise InputError(
                f"Checkpoint {folder} has format {version}, and this Aether reads up to format {FORMAT}; update Aether."
            )
        for old in range(version, FORMAT):
            if old not in UPGRADES:
                raise InputError(f"Checkpoint {folder} has format {version}; this Aether, at {FORMAT}, cannot read it.")
            record = UPGRADES[old](record)
        return record

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what goes wrong with the storage into `StorageError`, and give back the space of a failed save."""
        try:
            yield
        except (InputError, StorageError):
            raise
        except Exception as e:
            if jax.process_index() == 0 and self._home.exists():
                with contextlib.suppress(Exception):
                    self._sweep()
            if storage.is_full(e):
                raise StorageError(
                    f"No space is left for checkpoints in {self.directory}; free some or choose another workdir. "
                    "Earlier checkpoints are untouched."
                ) from e
            raise StorageError(
                f"Cannot write checkpoints in {self.directory}: {storage.one_line(list(storage.causes(e))[-1])}"
            ) from e


def _read(folder: Any, saved: dict[str, Any], wanted: dict[str, Any]) -> list[Any]:
    """Read the wanted arrays, and nothing else, in the order of `wanted`."""
    import orbax.checkpoint as ocp

    _silence_orbax()
    keys = {name: saved[name]["key"] for name in wanted}
    targets = {keys[name]: arrays.target_of(leaf) for name, leaf in wanted.items()}
    how = {
        key: ocp.RestoreArgs(restore_type=np.ndarray, dtype=t.dtype)
        if isinstance(t, np.ndarray)
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=t.dtype, global_shape=t.shape, sharding=t.sharding)
        for key, t in targets.items()
    }
    args = ocp.args.PyTreeRestore(item=targets, restore_args=how, partial_restore=True)
    values = ocp.PyTreeCheckpointHandler().restore(folder, args=args)
    scalars = (bool, int, float)
    return [
        type(leaf)(values[keys[name]]) if isinstance(leaf, scalars) else values[keys[name]]
        for name, leaf in wanted.items()
    ]


def _everywhere(ok: bool) -> bool:
    """Tell whether `ok` holds on all processes; they wait here for each other."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _silence_orbax() -> None:
    """Keep Orbax's running commentary out of the log; what fails there is raised as well."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
