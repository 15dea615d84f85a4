"""What a person sees of a run: the progress line, and everything that the loop tells passed on to where it belongs.

The training thread only writes its JSON line and the progress line; everything slower happens in one background thread.
"""

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TextIO

from aether.errors import InputError
from aether.events import TensorBoard
from aether.storage import write_atomic
from aether.train.boards import Background, WandB, check_wandb
from aether.train.curves import CURVES, draw, short
from aether.train.metrics import METRICS, SAMPLES, TELEMETRY, Curve, Metrics, Values
from aether.workdir import Workdir

TERMINAL_SECONDS = 0.1  # between redraws of the bar
PLAIN_SECONDS = 10.0  # between lines where there is no terminal
PROGRESS = ("loss", "learning_rate", "tokens_per_second", "images_per_second", "mfu")


class Reporter:
    """Everything a run tells, made once by the training loop; only the primary process writes and prints.

    Args:
      workdir: the run folder.
      total_steps: the run's last step.
      start_step: the step restored; lines beyond it are dropped from `metrics.jsonl`.
      primary: whether this process writes and prints; the others read nothing either, and remember what `has` asks for.
      wandb: the W&B project, or "".
      told: whether `units` will be called: then there is a `telemetry.jsonl`.
      name: the run's name, in the title of the curves and in W&B.
      config: the resolved config.
      unit: what a run counts, tokens or images.
      per_step: how many of them a step takes (0: unknown).
      parameters: the model's number of parameters, for the title (0: unknown).
      stream: where text goes (default: stderr).
    """

    def __init__(
        self,
        workdir: Workdir,
        *,
        total_steps: int,
        start_step: int,
        name: str,
        config: dict[str, Any],
        primary: bool = True,
        unit: str = "tokens",
        per_step: int = 0,
        wandb: str = "",
        told: bool = False,
        parameters: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        check_wandb(wandb)
        self.name, self.parameters = name, parameters
        self._workdir, self._primary = workdir, primary
        self._unit, self._per_step = unit, per_step
        self._metrics, self._samples = (
            Metrics(workdir.file(name) if primary else None, start_step=start_step, write=True)
            for name in (METRICS, SAMPLES)
        )
        kept = workdir.file(TELEMETRY) if primary and (told or workdir.exists(TELEMETRY)) else None
        self._units = Metrics(kept, start_step=start_step, write=True)
        self._told: set[tuple[int, str]] = set()
        self._pending: dict[str, Curve] | None = None
        self._undrawn = self._closed = False
        if not primary:
            return
        self._console = Console(stream or sys.stderr, total_steps, per_step)
        self._board = TensorBoard(workdir.local / "tensorboard", start_step)
        self._wandb: WandB | None = None
        if wandb:
            try:
                self._wandb = WandB(workdir, wandb, name, config, self._metrics.furthest)
            except InputError:
                self._metrics.close()
                self._samples.close()
                self._units.close()
                raise
        self._background = Background(self.say)
        for name, file in ((METRICS, self._metrics), (TELEMETRY, self._units)):
            if file.dropped:
                self.say(f"{name}: dropped {file.dropped} lines beyond step {start_step} or torn.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print a line of log."""
        if self._primary:
            self._console.say(text)

    def has(self, step: int, split: str) -> bool:
        """Say whether there is a line of this step and split, for example from before a restart."""
        return (step, split) in self._told or self._metrics.has(step, split)

    def tell(self, step: int, splits: Iterable[str]) -> None:
        """Have `has` say that there are lines of these splits: what the primary process read, for the others."""
        self._told |= {(step, split) for split in splits}

    def train(self, step: int, metrics: Values) -> None:
        """Record the batch that made update `step`; the progress line shows loss, learning rate, rate and MFU."""
        self._record(step, "train", metrics)
        if self._primary:
            self._console.progress(step, metrics)

    def validation(self, step: int, name: str, metrics: Values) -> None:
        """Record the scores of a validation set after `step` updates."""
        self._record(step, name, metrics)
        self.say(f"step {step}  {name}: {_describe(metrics)}")

    def units(self, step: int, layers: Mapping[str, Values]) -> None:
        """Record what is told of the ⵟ layers, by name, after `step` updates."""
        for name, values in layers.items():
            self._units.add(step, name, values)
            self._show(step, f"units/{name}", values)

    def sample(self, step: int, text: str) -> None:
        """Show a text that the model wrote after `step` updates."""
        if not self._primary:
            return
        if not self._samples.has(step, "sample"):
            self._samples.add(step, "sample", dict(text=text))
        self.say("\n".join([f"step {step}  sample:", *(f"  | {line}" for line in text.splitlines())]))
        now = time.time()
        self._background.put("TensorBoard", lambda: self._board.text(step, now, "sample", text))
        if self._wandb is not None:
            run = self._wandb
            self._background.put("W&B", lambda: run.sample(step, text))

    def curves(self) -> None:
        """Draw `curves.png` in the background; asked again before that has begun, it is drawn once."""
        if not (self._primary and "train" in self._metrics.curves):
            return
        self._pending = {split: curve.copy() for split, curve in self._metrics.curves.items()}
        self._undrawn = False
        self._background.put(CURVES, self._draw)

    def flush(self) -> None:
        """Return once every line is safe, on the remote too; the rest follows in the background."""
        self._metrics.flush()
        self._samples.flush()
        self._units.flush()
        self._workdir.sync(METRICS, SAMPLES, TELEMETRY)
        if self._primary:
            self._background.put("TensorBoard", self._board.flush)
            self._background.put("upload", self._workdir.sync)

    def close(self) -> None:
        """Draw the last curves, finish everything that is queued, and close all files."""
        if self._closed:
            return
        self._closed = True
        if self._primary:
            if self._undrawn:
                self.curves()
            self._background.put("TensorBoard", self._board.close)
            if self._wandb is not None:
                self._background.put("W&B", self._wandb.close)
            self._background.stop()
            self._console.close()
        self._metrics.close()
        self._samples.close()
        self._units.close()
        self._workdir.sync()

    def _record(self, step: int, split: str, values: Values) -> None:
        self._metrics.add(step, split, values)
        self._undrawn = True
        self._show(step, split, values)

    def _show(self, step: int, split: str, values: Values) -> None:
        """Pass a line on to TensorBoard and W&B."""
        if self._primary:
            now, values = time.time(), dict(values)
            self._background.put("TensorBoard", lambda: self._board.scalars(step, now, split, values))
            if self._wandb is not None:
                run = self._wandb
                self._background.put("W&B", lambda: run.log(step, split, values))

    def _draw(self) -> None:
        curves, self._pending = self._pending, None
        if curves is not None:
            title = self.name + (f"  ·  {short(self.parameters)} parameters" if self.parameters else "")
            write_atomic(self._workdir.file(CURVES), draw(curves, title, self._per_step, self._unit))


class Console:
    """Lines and progress on a stream: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, stream: TextIO, total: int, per_step: int) -> None:
        self._stream, self._total, self._per_step = stream, total, per_step
        self._terminal = stream.isatty()
        self._bar: Any = None
        self._first: tuple[int, float] | None = None
        self._shown = -math.inf

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def progress(self, step: int, values: Values) -> None:
        """Show a step, if the last one shown is long enough ago."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        pause = TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS
        if now - self._shown < pause and step < self._total:
            return
        self._shown = now
        text = f"{_describe({name: values.get(name) for name in PROGRESS})}  ETA {self._remaining(step, now, values)}"
        if self._terminal:
            self._draw_bar(step, text)
        else:
            self.say(f"step {step}/{self._total}  {text}")

    def _draw_bar(self, step: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread: this class decides when to redraw
            layout = "step {n_fmt}/{total_fmt} |{bar}| {desc}"
            self._bar = tqdm(total=self._total, file=self._stream, bar_format=layout, ncols=80, nrows=20, initial=step)
        with contextlib.suppress(OSError):
            self._bar.ncols = os.get_terminal_size(self._stream.fileno()).columns or 80  # some report no size
        self._bar.n = step
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()

    def _remaining(self, step: int, now: float, values: Values) -> str:
        """Estimate by the pace since the first step shown, or at that step by its rate."""
        assert self._first is not None
        done, seconds = step - self._first[0], now - self._first[1]
        rate = values.get("tokens_per_second") or values.get("images_per_second")
        if not done and rate and self._per_step:
            done, seconds = 1, self._per_step / rate
        if not done:
            return "0:00:00" if step >= self._total else "?"
        return str(datetime.timedelta(seconds=round((self._total - step) * seconds / done)))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def finished(workdir: Workdir) -> str:
    """Say in a line where a run has ended: its last step and its last validation losses."""
    curves = Metrics(workdir.file(METRICS)).curves
    last = max((curve.steps[-1] for curve in curves.values()), default=0)
    losses = [f"{name} loss {curve.loss[-1]:.4f}" for name, curve in curves.items() if name != "train"]
    return ", ".join([f"This run is finished: step {last}", *losses])


def _describe(values: Values) -> str:
    """Put the numbers that a person watches into a line; what is missing is left out."""
    shapes: dict[str, Callable[[float], str]] = {
        "loss": lambda v: f"loss {v:.4f}",
        "perplexity": lambda v: f"perplexity {v:.2f}" if v < 1e4 else f"perplexity {v:.3g}",
        "bits_per_byte": lambda v: f"bits/byte {v:.4f}",
        "accuracy": lambda v: f"accuracy {v:.2%}",
        "top5": lambda v: f"top-5 {v:.2%}",
        "calibration_error": lambda v: f"calibration error {v:.2%}",
        "learning_rate": lambda v: f"lr {v:.2e}",
        "tokens_per_second": lambda v: f"{short(v)} tokens/s",
        "images_per_second": lambda v: f"{short(v)} images/s",
        "mfu": lambda v: f"MFU {v:.1%}",
    }
    shown = ((shape, values.get(name)) for name, shape in shapes.items())
    return "  ".join(shape(value) for shape, value in shown if value is not None)
