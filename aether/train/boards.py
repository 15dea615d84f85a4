"""Weights & Biases, and the background thread that writes to it and to TensorBoard."""

import html
import importlib.util
import queue
import secrets
import threading
from collections.abc import Callable

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
