"""What a person sees of a run: `metrics.jsonl`, the progress line, TensorBoard, W&B and `curves.png`.

The training thread only writes its JSON line and the progress line; everything slower happens in one background thread.
"""

import bisect
import contextlib
import datetime
import html
import importlib.util
import io
import itertools
import json
import math
import os
import queue
import secrets
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from aether.errors import InputError
from aether.workdir import Workdir, storage_errors, write_atomic

METRICS = "metrics.jsonl"
CURVES = "curves.png"
WANDB = "wandb.json"
TERMINAL_SECONDS = 0.1  # between redraws of the bar
PLAIN_SECONDS = 10.0  # between lines where there is no terminal
PROGRESS = ("loss", "learning_rate", "tokens_per_second", "mfu")
NOT_A_NUMBER = float("nan")
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN = "#2f6fde"
SETS = ("#e4572e", "#17a673", "#9b51e0", "#d49a00", "#c2185b")

Values = Mapping[str, float | None]


@dataclass
class Curve:
    """The lines of one split, in step order; what is missing or not finite is NaN."""

    steps: array = field(default_factory=lambda: array("q"))
    loss: array = field(default_factory=lambda: array("d"))
    rate: array = field(default_factory=lambda: array("d"))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line's loss and learning rate."""
        self.steps.append(record["step"])
        for column, name in ((self.loss, "loss"), (self.rate, "learning_rate")):
            value = record.get(name)
            column.append(NOT_A_NUMBER if value is None else value)

    def has(self, step: int) -> bool:
        """Say whether there is a line of this step."""
        i = bisect.bisect_left(self.steps, step)
        return i < len(self.steps) and self.steps[i] == step

    def copy(self) -> "Curve":
        """Return a copy that another thread may read."""
        return Curve(self.steps[:], self.loss[:], self.rate[:])


class Metrics:
    """`metrics.jsonl`: each (step, split) once, also over restarts; the curves are kept in memory.

    Opening drops a torn line and every line beyond `start_step`. Floats are written so that they read back equal;
    one that is not finite becomes `null`, and the line lists its name under `nonfinite`.
    """

    def __init__(self, path: Path, *, start_step: float = math.inf, write: bool = False) -> None:
        self.curves: dict[str, Curve] = {}
        self.furthest = -1  # the last step of the file as it was found
        self.dropped = 0
        self._path = path
        self._file: io.FileIO | None = None
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if self._load(line, start_step)]
        self.dropped = len(lines) - len(kept)
        if write:
            if self.dropped:
                write_atomic(path, b"".join(kept))
            with storage_errors(path):
                self._file = open(path, "ab", buffering=0)

    def _load(self, line: bytes, start_step: float) -> bool:
        """Remember a line and say whether it stays."""
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "split" not in record:
            return False
        self.furthest = max(self.furthest, record["step"])
        if record["step"] > start_step:
            return False
        self.curves.setdefault(record["split"], Curve()).add(record)
        return True

    def add(self, step: int, split: str, values: Values) -> None:
        """Remember a line, and write it if this process writes."""
        record: dict[str, Any] = {"step": step, "split": split}
        bad = []
        for name, value in values.items():
            if value is not None and not isinstance(value, int | str):
                value = float(value)
                if not math.isfinite(value):
                    bad.append(name)
                    value = None
            record[name] = value
        if bad:
            record["nonfinite"] = bad
        self.curves.setdefault(split, Curve()).add(record)
        if self._file is not None:
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            with storage_errors(self._path):
                while line:
                    line = line[self._file.write(line) :]

    def has(self, step: int, split: str) -> bool:
        """Say whether there is a line of this step and split."""
        return split in self.curves and self.curves[split].has(step)

    def flush(self) -> None:
        """Return once every line is on the disk."""
        if self._file is not None:
            with storage_errors(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None


class Console:
    """Lines and progress on a stream: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, stream: TextIO, total: int, tokens_per_step: int) -> None:
        self._stream, self._total, self._tokens = stream, total, tokens_per_step
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
        """Estimate by the pace since the first step shown, or at that step by its tokens a second."""
        assert self._first is not None
        done, seconds = step - self._first[0], now - self._first[1]
        speed = values.get("tokens_per_second")
        if not done and speed and self._tokens:
            done, seconds = 1, self._tokens / speed
        if not done:
            return "0:00:00" if step >= self._total else "?"
        return str(datetime.timedelta(seconds=round((self._total - step) * seconds / done)))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


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


class Reporter:
    """Everything a run tells, made once by the training loop; only the primary process writes and prints.

    Args:
      workdir: the run folder.
      total_steps: the run's last step.
      start_step: the step restored; lines beyond it are dropped from `metrics.jsonl`.
      primary: whether this process writes and prints; the others remember what `has` asks for.
      log_every: steps between calls of `train`.
      wandb: the W&B project, or "".
      name: the run's name, in the title of the curves and in W&B.
      config: the resolved config.
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
        log_every: int = 1,
        wandb: str = "",
        parameters: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        check_wandb(wandb)
        data = config.get("data", {})
        self.name, self.parameters = name, parameters
        self._workdir, self._primary = workdir, primary
        self._tokens_per_step = data.get("batch_size", 0) * data.get("context", 0)
        self._metrics = Metrics(workdir.file(METRICS), start_step=start_step, write=primary)
        self._pending: dict[str, Curve] | None = None
        self._undrawn = self._closed = False
        if not primary:
            return
        self._console = Console(stream or sys.stderr, total_steps, self._tokens_per_step)
        self._board = TensorBoard(workdir.local / "tensorboard", start_step)
        self._wandb: WandB | None = None
        if wandb:
            try:
                self._wandb = WandB(workdir, wandb, name, config, self._metrics.furthest)
            except InputError:
                self._metrics.close()
                raise
        self._background = Background(self.say)
        if self._metrics.dropped:
            self.say(f"{METRICS}: dropped {self._metrics.dropped} lines beyond step {start_step} or torn.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print a line of log."""
        if self._primary:
            self._console.say(text)

    def phase(self, name: str, seconds: float) -> None:
        """Print how long a phase of the start-up took."""
        if self._primary:
            self.say(f"{name:>10} {seconds:8.2f} s")
            now = time.time()
            text = f"{name}: {seconds:.2f} s"
            self._background.put("TensorBoard", lambda: self._board.text(0, now, f"startup/{name}", text))

    def has(self, step: int, split: str) -> bool:
        """Say whether there is a line of this step and split, for example from before a restart."""
        return self._metrics.has(step, split)

    def train(self, step: int, metrics: Values) -> None:
        """Record the batch that made update `step`; the progress line shows loss, learning rate, tokens/s and MFU."""
        self._record(step, "train", metrics)
        if self._primary:
            self._console.progress(step, metrics)

    def validation(self, step: int, name: str, metrics: Values) -> None:
        """Record a validation set after `step` updates: loss, perplexity, bits_per_byte, accuracy, tokens."""
        self._record(step, name, metrics)
        self.say(f"step {step}  {name}: {_describe(metrics)}")

    def sample(self, step: int, text: str) -> None:
        """Show a text that the model wrote after `step` updates."""
        if not self._primary:
            return
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
        """Return once every line of `metrics.jsonl` is safe, on the remote too; the rest follows in the background."""
        self._metrics.flush()
        self._workdir.sync(METRICS)
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
        self._workdir.sync()

    def _record(self, step: int, split: str, values: Values) -> None:
        self._metrics.add(step, split, values)
        self._undrawn = True
        if self._primary:
            now, values = time.time(), dict(values)
            self._background.put("TensorBoard", lambda: self._board.scalars(step, now, split, values))
            if self._wandb is not None:
                run = self._wandb
                self._background.put("W&B", lambda: run.log(step, split, values))

    def _draw(self) -> None:
        curves, self._pending = self._pending, None
        if curves is not None:
            title = self.name + (f"  ·  {_short(self.parameters)} parameters" if self.parameters else "")
            write_atomic(self._workdir.file(CURVES), draw(curves, title, self._tokens_per_step))


def check_wandb(project: str) -> None:
    """Refuse a W&B project where wandb is not installed; cheap, so that a command can ask before it does anything."""
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f'train.wandb is {project!r} but wandb is not installed; pip install "aether[wandb]" or leave it empty.'
        )


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
        "learning_rate": lambda v: f"lr {v:.2e}",
        "tokens_per_second": lambda v: f"{_short(v)} tokens/s",
        "mfu": lambda v: f"MFU {v:.1%}",
    }
    shown = ((shape, values.get(name)) for name, shape in shapes.items())
    return "  ".join(shape(value) for shape, value in shown if value is not None)


def _short(number: float) -> str:
    """Write a count with three digits: 950, 12.3k, 1.24M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g}{unit}"
    return f"{number:.0f}"


def draw(curves: Mapping[str, Curve], title: str, tokens_per_step: int = 0) -> bytes:
    """Return a PNG (1600 x 1000): losses above, learning rate below, over steps, with tokens on top if known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.25), dpi=160, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _style(upper)
    _style(lower)
    _draw_losses(upper, curves)
    steps, rate = _envelope(*_finite(curves["train"].steps, curves["train"].rate))
    lower.fill_between(steps, rate, color=MUTED, alpha=0.15, linewidth=0)
    lower.plot(steps, rate, color=MUTED, linewidth=1.8)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lower.locator_params(axis="y", nbins=3)
    lower.set_ylabel("learning rate", fontsize=12, color=INK)
    lower.set_xlabel("step", fontsize=13, color=INK)
    upper.set_ylabel("loss (nats per token)", fontsize=13, color=INK)
    upper.set_title(title, fontsize=17, fontweight="bold", color=INK, loc="left", pad=10)
    last = max(curve.steps[-1] for curve in curves.values())
    lower.set_xlim(0, last * 1.02)
    lower.locator_params(axis="x", integer=True)
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if tokens_per_step:
        tokens = upper.secondary_xaxis("top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
        tokens.xaxis.set_major_formatter(lambda value, _: f"{_short(value)} tokens" if value else "")
        tokens.locator_params(axis="x", nbins=5)
        tokens.tick_params(labelsize=11, labelcolor=MUTED, color=MUTED, length=4)
        tokens.spines["top"].set_visible(False)
    figure.align_ylabels()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a run's name may be in any script
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_losses(axis: Any, curves: Mapping[str, Curve]) -> None:
    """Draw the training loss, raw and smoothed, and each validation set; choose the y range."""
    steps, loss = _finite(curves["train"].steps, curves["train"].loss)
    if not len(loss):
        return
    smooth = _smooth(loss)
    axis.plot(*_envelope(steps, loss), color=TRAIN, alpha=0.22, linewidth=0.8)
    axis.plot(*_envelope(steps, smooth), color=TRAIN, linewidth=2.4, label=f"train  {smooth[-1]:.3f}")
    lowest, highest = [smooth[-1], np.percentile(loss, 0.5)], [smooth[len(smooth) // 100]]
    sets = (item for item in sorted(curves.items()) if item[0] != "train")
    for color, (name, curve) in zip(itertools.cycle(SETS), sets, strict=False):
        x, y = _finite(curve.steps, curve.loss)
        if len(x):
            line = dict(color=color, linewidth=2, marker="o", markersize=6, markeredgecolor="white")
            axis.plot(x, y, label=f"{name}  {y[-1]:.3f}", **line)
            lowest.append(y.min())
            highest.append(y[-1])
    margin = 0.06 * (max(highest) - min(lowest)) or 0.1
    axis.set_ylim(min(lowest) - margin, max(highest) + margin)
    axis.legend(fontsize=14, frameon=False, labelcolor=INK, loc="upper right")


def _style(axis: Any) -> None:
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=12, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)


def _finite(steps: array, values: array) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays, without the points whose value is NaN."""
    x, y = np.array(steps), np.array(values)
    keep = np.isfinite(y)
    return x[keep], y[keep]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a thirtieth of the points, narrower at the start, where the loss falls fast."""
    n = len(values)
    i = np.arange(n)
    half = np.minimum(max(3, n // 60), i)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = i - half, np.minimum(i + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def _envelope(x: np.ndarray, y: np.ndarray, bins: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Thin a long curve to the lowest and highest point of each bin, so that a million steps draw at once."""
    if len(x) <= 4 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    return np.repeat(x[edges], 2), np.stack([low, high], axis=1).ravel()
