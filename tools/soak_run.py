"""A run under `launch.local` as the soak sees it: started, watched through its files, hit, and ended for certain."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from launch.children import ends_with_parent

ROOT = Path(__file__).parents[1]
PATIENCE = 150.0  # seconds for anything to happen that must

CONFIG = '''"""What `python -m tools.soak` trains."""

from aether.config import default_config


def get_config():
    config = default_config()
    config.model.layers, config.model.heads, config.model.width = 1, 2, 32
    config.model.dtype, config.model.dropout = "float32", 0.1
    config.data.path, config.data.context, config.data.batch_size = {text!r}, 64, 32
    config.data.cache_dir = {cache!r}
    config.data.validation.own = {own!r}
    config.optim.learning_rate, config.optim.warmup_steps, config.optim.schedule_steps = 3e-3, 20, 1000
    config.train.seed, config.train.ema = {seed}, 0.9
    config.train.eval_every, config.train.eval_batches, config.train.sample_tokens = 25, 1, 0
    config.checkpoint.every = {every}
    config.faults.heartbeat_timeout_seconds = 10
    return config
'''


class Broken(Exception):
    """The run has not done what it must."""


class Training:
    """A run in a folder, by one launcher after the other.

    Args:
      folder: of the run.
      config: a config file.
      steps: to make.
      log: a file that the launchers' words are added to.
      environment: of the launchers.
    """

    def __init__(self, folder: Path, config: Path, steps: int, log: Path, environment: dict[str, str]):
        self.folder, self.steps, self.log = folder, steps, log
        self._config, self._environment = config, environment
        self._launcher: subprocess.Popen | None = None
        self.count = 0

    def start(self, count: int) -> None:
        """Start `count` processes."""
        self.count = count
        command = [sys.executable, "-m", "launch.local", f"--processes={count}", "--devices=1", "--restarts=3", "--"]
        command += [f"--config={self._config}", f"--workdir={self.folder}", f"--config.train.steps={self.steps}"]
        with self.log.open("a") as log:
            log.write(f"\n$ {count} processes\n")
            log.flush()
            self._launcher = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=ends_with_parent(),
            )  # fmt: skip

    def code(self) -> int | None:
        """Return the launcher's exit code; None while it runs."""
        return self._launcher.poll() if self._launcher else None

    def pids(self) -> dict[int, int]:
        """Return {process: its process id} of those that train."""
        assert self._launcher is not None
        found = {}
        for name in _words(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children", " "):
            for variable in _words(f"/proc/{name}/environ", "\0"):
                if variable.startswith("JAX_PROCESS_ID="):
                    found[int(variable.partition("=")[2])] = int(name)
        return found

    def send(self, number: int, process: int | None = None) -> None:
        """Send a signal to one process, or to the launcher."""
        assert self._launcher is not None
        pid = self._launcher.pid if process is None else self.pids().get(process)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End all processes at once."""
        if self._launcher is None:
            return
        for pid in [*self.pids().values(), self._launcher.pid]:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._launcher.wait()

    def wait(self) -> int:
        """Wait for the launcher's end and return its exit code."""
        assert self._launcher is not None
        try:
            return self._launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Broken(f"the run has not ended within {PATIENCE:.0f} s:\n{self.said(20)}") from None

    def finish(self) -> int:
        """Wait for the end as long as steps are made, and return the launcher's exit code."""
        while (before := self.step()) < self.steps and self.passes(min(before + 20, self.steps)):
            pass
        return self.wait()

    def step(self) -> int:
        """Return the step of the last line of metrics.jsonl, 0 if there is none."""
        with suppress(OSError, ValueError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
            return json.loads(lines[-1])["step"] if lines else 0
        return 0

    def saved(self) -> list[int]:
        """Return the steps of the checkpoints, the oldest first."""
        with suppress(FileNotFoundError):
            return sorted(int(n) for n in os.listdir(self.folder / "checkpoints") if n.isdecimal())
        return []

    def mark(self) -> int:
        """Return a place in the log, for `since`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def since(self, mark: int) -> str:
        """Return what the processes have said since then."""
        with self.log.open("rb") as file:
            file.seek(mark)
            return file.read().decode(errors="replace")

    def said(self, lines: int) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def resumed(self, mark: int) -> int | None:
        """Return the step that the last start since then went on from; None if none has made a step yet."""
        starts = re.findall(r"going on from step (\d+) of", self.since(mark))
        return int(starts[-1]) if starts and self.step() > int(starts[-1]) else None

    def until(self, condition, what: str) -> None:  # type: ignore[no-untyped-def]
        """Wait for a condition.

        Raises:
          Broken: it does not come.
        """
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise Broken(f"{what} has not come within {PATIENCE:.0f} s; the last words were:\n{self.said(20)}")
            time.sleep(0.005)

    def passes(self, step: int) -> bool:
        """Wait until a step is made; False if the run ends before."""
        self.until(lambda: self.step() >= step or self.code() is not None, f"step {step}")
        return self.code() is None


def _words(path: str, separator: str) -> list[str]:
    try:
        return [word for word in Path(path).read_text().split(separator) if word]
    except OSError:
        return []
