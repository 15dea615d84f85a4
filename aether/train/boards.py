"""TensorBoard and Weights & Biases, which a background thread writes to."""

import html
import importlib.util
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aether.errors import InputError
from aether.train.metrics import Values
from aether.workdir import Workdir

WANDB = "wandb.json"


class Background(threading.Thread):
    """Runs jobs one after another; one that fails is reported by `warn` and training goes on."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__(name="aether-report", daemon=True)
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._warn = warn
        self._broken: set[str] = set()
        self.start()

    def put(self, name: str, job: Callable[[], None]) -> None:
        """Queue a job; `name` says in a warning what failed."""
        self._jobs.put((name, job))

    def run(self) -> None:
        """Work until `stop`; TensorBoard and W&B are given up at their first failure, others try again."""
        while (item := self._jobs.get()) is not None:
            name, job = item
            if name in self._broken:
                continue
            try:
                job()
            except Exception as e:
                self._warn(f"warning: {name} failed, training goes on without it: {type(e).__name__}: {e}")
                if name in ("TensorBoard", "W&B"):
                    self._broken.add(name)

    def stop(self) -> None:
        """Finish what is queued."""
        self._jobs.put(None)
        self.join()


class TensorBoard:
    """Event files, written by the calling thread and opened by the first event."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder, self._start = folder, start_step
        self._writer: Any = None

    def _write(self, step: int, seconds: float, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter

            continued = self._folder.is_dir() and any(self._folder.iterdir())
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{secrets.token_hex(2)}")
            if continued:  # TensorBoard then forgets what earlier files say of this step and later ones
                log = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=seconds, step=self._start + 1, session_log=log))
        self._writer.write_event(Event(wall_time=seconds, step=step, **content))

    def scalars(self, step: int, seconds: float, split: str, values: Values) -> None:
        """Write a line's numbers under `split/name`; `seconds` is when they were measured."""
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {k: float(v) for k, v in values.items() if v is not None and not isinstance(v, str)}
        content = [Summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in numbers.items()]
        self._write(step, seconds, summary=Summary(value=content))

    def text(self, step: int, seconds: float, tag: str, text: str) -> None:
        """Write a text, shown as it is."""
        from tensorboardX.summary import text as summary

        self._write(step, seconds, summary=summary(tag, f"<pre>{html.escape(text)}</pre>"))

    def flush(self) -> None:
        """Put everything on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """One Weights & Biases run per run folder; a restart goes on with it, without repeating steps it has."""

    def __init__(self, workdir: Workdir, project: str, name: str, config: dict, furthest: int) -> None:
        import wandb

        saved = workdir.read_json(WANDB) if workdir.exists(WANDB) else {}
        if saved.get("project") != project:
            saved = {"project": project, "id": secrets.token_hex(4), "logged": -1}
        self._logged = max(furthest, saved["logged"])
        workdir.write_json(WANDB, saved | {"logged": self._logged})
        try:
            self._run = wandb.init(
                project=project,
                id=saved["id"],
                resume="allow",
                name=name,
                config=config,
                dir=str(workdir.local),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as e:
            raise InputError(
                f"train.wandb is {project!r} but W&B refuses: {e} Run `wandb login`, or set WANDB_MODE=offline."
            ) from e
        self._run.define_metric("*", step_metric="step")
        self._html = wandb.Html

    def log(self, step: int, split: str, values: Values) -> None:
        """Log a line's numbers under `split/name`."""
        if step > self._logged:
            self._run.log({"step": step} | {f"{split}/{k}": v for k, v in values.items() if v is not None})

    def sample(self, step: int, text: str) -> None:
        """Log a text."""
        if step > self._logged:
            self._run.log({"step": step, "sample": self._html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """Finish the run, its uploads too."""
        self._run.finish()


def check_wandb(project: str) -> None:
    """Refuse a W&B project where wandb is not installed; cheap, so that a command can ask before it does anything."""
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f'train.wandb is {project!r} but wandb is not installed; pip install "aether[wandb]" or leave it empty.'
        )
