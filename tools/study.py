"""Compare settings, each at its own best learning rate, and print the table.

  python -m tools.study --config=configs/shakespeare_char.py --config.data.path=tinyshakespeare.txt --out=runs/study \
      --vary=model.kind=gpt2,aether --sweep=optim.learning_rate=1e-3,2e-3,3e-3,6e-3,1e-2,2e-2 --seeds=3 --jobs=2

First every value of --sweep, for every combination of the --vary values, with seed 0 and a part of the steps; then
each combination at its best value, with all steps and --seeds seeds. The final loss on the whole first validation set
decides. Each run is a `launch.train` with a folder of its own, so the same command goes on after a kill.
OUT/results.jsonl has a line for every run, OUT/logs what each said, OUT/sweep.png the losses over the swept key.
"""

import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags

from aether.config import build, differences, knobs
from aether.errors import AetherError, InputError, Stopped, StorageError
from aether.workdir import storage_errors, write_atomic
from launch import cli, overrides

TRAIN = [sys.executable, "-m", "launch.train"]
QUIET = ["train.log_every=100", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=0"]
PLAN, RESULTS, PLOT = "study.json", "results.jsonl", "sweep.png"
DIVERGED_EXIT = 3  # launch.train gave up after too many non-finite steps
FATAL = {2: InputError, 74: StorageError}  # what the next run would end with too

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Combination:
    """One choice of the --vary values, as overrides, and the steps of its runs."""

    label: str
    overrides: list[str]
    steps: int
    sweep_steps: int


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    combination: str
    value: float | None  # of the swept key; None without a sweep
    seed: int
    steps: int
    overrides: list[str]


@dataclass(frozen=True)
class Study:
    """All that the runs and the tables follow from; `base` is the config that every run shares."""

    config: str
    overrides: list[str]
    base: dict[str, Any]
    combinations: list[Combination]
    key: str
    values: list[float]
    seeds: int

    def job(self, c: Combination, value: float | None, seed: int, steps: int) -> Job:
        """Describe a run; its name says what it is, so that a run of another length is another run."""
        words = [c.label, f"steps={steps}", f"seed={seed}"]
        own = [*c.overrides, f"train.steps={steps}", f"train.seed={seed}"]
        if value is not None:
            words.insert(1, f"{self.key.split('.', 1)[1]}={value!r}")
            own.append(f"{self.key}={value!r}")
        return Job(re.sub(r"[^\w.=+-]", "_", "_".join(words)), c.label, value, seed, steps, [*self.overrides, *own])

    def sweep(self, c: Combination) -> list[Job]:
        """List the runs that find the best value for a combination."""
        return [self.job(c, value, 0, c.sweep_steps) for value in self.values]

    def best(self, c: Combination, results: Results) -> float | None:
        """Return the value with the lowest loss so far; None where no run has a finite one, or nothing is swept."""
        losses = {job.value: loss_of(results.get(job.name)) for job in self.sweep(c)}
        finite = {value: loss for value, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(finite, key=lambda value: finite[value]) if finite else None

    def full(self, c: Combination, results: Results) -> list[Job]:
        """List the whole runs of a combination at its best value; none if there is no such value."""
        value = self.best(c, results)
        if self.values and value is None:
            return []
        return [self.job(c, value, seed, c.steps) for seed in range(self.seeds)]

    def expected(self) -> list[int]:
        """Return the steps of all runs, done or not."""
        again = self.values and self.seeds > 0  # a sweep at full length has made the first seed's run already
        swept = [c.sweep_steps for c in self.combinations for _ in self.values]
        return swept + [
            c.steps
            for c in self.combinations
            for seed in range(self.seeds)
            if not (again and seed == 0 and c.steps == c.sweep_steps)
        ]


def loss_of(record: Mapping[str, Any] | None) -> float | None:
    """Return the deciding loss of a run: infinite if it diverged, None if it failed or is yet to come."""
    if record is None or record["status"] == "failed":
        return None
    return math.inf if record["status"] == "diverged" else record["loss"]


def plan(args: flags.FlagValues) -> Study:
    """Make the study that the flags describe, every config of it checked."""
    path = cli.require(args, "config", "configs/shakespeare_char.py")
    shared = [*QUIET, *args.override]
    base = overrides.make_config(path, shared)
    if not (base.data.validation or base.data.validation_fraction):
        raise InputError("data.validation_fraction is 0 and data.validation is empty; a study needs a validation text.")
    if base.optim.schedule_steps:
        raise InputError(
            f"optim.schedule_steps is {base.optim.schedule_steps}; set it to 0, so that it follows train.steps."
        )
    vary = [split_list("vary", word) for word in args.vary]
    key, texts = split_list("sweep", args.sweep) if args.sweep else ("", [])
    taken = [name for name, _ in vary] + [key, "train.seed"]
    for name in taken:
        if taken.count(name) > 1:
            raise InputError(
                f"{name} is set twice; --vary, --sweep and --seeds (train.seed) each take keys of their own."
            )
    values = sweep_values(key, texts) if key else []
    found = []
    for chosen in itertools.product(*([(name, text) for text in options] for name, options in vary)):
        label = ",".join(f"{name.split('.', 1)[-1]}={text}" for name, text in chosen) or Path(path).stem
        own = [f"{name}={text}" for name, text in chosen]
        steps = overrides.make_config(path, [*shared, *own]).train.steps
        found.append(Combination(label, own, steps, max(1, round(steps * args.sweep_fraction))))
    study = Study(path, shared, base.to_json(), found, key, values, args.seeds)
    check_configs(study)
    return study


def check_configs(study: Study) -> None:
    """Build the config of every run, and refuse two runs of one name."""
    names = set()
    for c in study.combinations:
        for job in study.sweep(c) or [study.job(c, None, 0, c.steps)]:
            made = overrides.make_config(study.config, job.overrides)
            made.resolved(made.model.vocab or 256)  # any vocabulary: the tokenizer's is not known yet
            if job.name in names:
                raise InputError(f"Two runs would be called {job.name}; give every value of --vary and --sweep once.")
            names.add(job.name)


def split_list(flag: str, word: str) -> tuple[str, list[str]]:
    """Split KEY=VALUE,VALUE into the key and the values."""
    key, _, text = word.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key or not all(values):
        raise InputError(f"--{flag} is {word!r}; write --{flag}=KEY=VALUE,VALUE.")
    return key, values


def sweep_values(key: str, texts: Sequence[str]) -> list[float]:
    """Return the swept numbers in rising order."""
    kind = {k: f.type for k, f in knobs()}.get(key, float)  # an unknown key is told by the schema later
    if kind not in (int, float):
        raise InputError(f"--sweep names {key}, which is not a number; give it to --vary.")
    return sorted(overrides.parse(key, text, kind) for text in texts)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of every run by its name; a torn line is left out."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records[record["run"]] = record
    return records


def read_plan(out: Path) -> Study:
    """Return the study that a folder holds."""
    if not (out / PLAN).exists():
        raise InputError(f"--out is {out}, which holds no study; give the folder of one, or leave --table_only out.")
    made = json.loads((out / PLAN).read_text(encoding="utf-8"))
    return Study(**{**made, "combinations": [Combination(**c) for c in made["combinations"]]})


def open_folder(out: Path, study: Study) -> None:
    """Write the plan down; refuse a folder whose runs had another base, their length aside."""
    if (out / PLAN).exists():
        for key, was, now, _ in differences(build(read_plan(out).base), build(study.base)):
            if key != "train.steps":
                raise InputError(f"The study in {out} has {key}={was!r}, this one {now!r}; give another --out.")
    write_atomic(out / PLAN, (json.dumps(asdict(study), indent=2, ensure_ascii=False) + "\n").encode())
    path = out / RESULTS
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_atomic(path, b"".join(x for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")))


@contextlib.contextmanager
def sole_user(out: Path) -> Iterator[int]:
    """Hold the folder's lock, which the runs inherit: what a killed study left running is waited for."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another study in {out}, or for runs that it left behind")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def cpu_groups(jobs: int) -> list[set[int]]:
    """Share the cores out among the jobs; empty sets where the system cannot pin."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(jobs)]
    cpus = sorted(os.sched_getaffinity(0))
    return [set(cpus[i::jobs]) or {cpus[i % len(cpus)]} for i in range(jobs)]


class Runner:
    """Runs jobs side by side, each on its cores, and writes their lines."""

    def __init__(self, study: Study, out: Path, jobs: int, lock: int):
        self.study, self.out, self.jobs, self.lock = study, out, jobs, lock
        self.results = read_results(out / RESULTS)
        self.cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for group in cpu_groups(jobs):
            self.cores.put(group)
        self.guard = threading.Lock()
        self.children: set[subprocess.Popen] = set()
        self.end: AetherError | None = None  # why no more runs start
        self.begin, self.steps_done = time.monotonic(), 0
        (out / "logs").mkdir(exist_ok=True)

    def done(self, job: Job) -> bool:
        """Say whether a run needs no more work; failed ones are tried again."""
        return self.results.get(job.name, {}).get("status") in ("done", "diverged")

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Run what is not done; raise what ended it early."""
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(self._run, job) for job in jobs if not self.done(job)]:
                future.result()
        if self.end:
            raise self.end

    def stop(self, why: AetherError) -> None:
        """Start no more runs, and let those under way save and end."""
        with self.guard:
            self.end = self.end or why
            for child in self.children:
                child.terminate()

    def _run(self, job: Job) -> None:
        cores = self.cores.get()
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # of this thread, which the child inherits, and XLA's pool with it
            command = [*TRAIN, f"--config={self.study.config}", *(f"--config.{o}" for o in job.overrides)]
            command.append(f"--workdir={self.out / job.name}")
            begin = time.monotonic()
            with storage_errors(self.out), open(self.out / "logs" / f"{job.name}.txt", "ab+") as log:
                offset = log.seek(0, os.SEEK_END)
                code = self._wait(command, log, job)
                log.seek(offset)
                said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            if code is not None and not (self.end and code):
                self._write(job, shlex.join(command), code, said, time.monotonic() - begin)
        except BaseException as error:
            self.stop(error if isinstance(error, AetherError) else AetherError(f"{job.name}: {error!r}"))
            raise
        finally:
            self.cores.put(cores)

    def _wait(self, command: list[str], log: Any, job: Job) -> int | None:
        """Return the exit code of a command; None if the study ended before it began."""
        with self.guard:
            if self.end:
                return None
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self.lock], process_group=0
            )
            self.children.add(child)
        say(f"start {job.name}")
        code = child.wait()
        with self.guard:
            self.children.discard(child)
        return code

    def _write(self, job: Job, command: str, code: int, said: list[str], seconds: float) -> None:
        record = dict(run=job.name, combination=job.combination, key=self.study.key, value=job.value, seed=job.seed)
        record |= dict(steps=job.steps, **outcome(self.out / job.name, job.steps, code, said))
        record |= dict(seconds=round(seconds, 1), command=command)
        with self.guard, storage_errors(self.out / RESULTS):
            with open(self.out / RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.results[job.name] = record
            self.steps_done += job.steps
        self._tell(record)
        if code in FATAL:
            self.stop(FATAL[code](f"{job.name}: {said[-1].removeprefix('error: ') if said else f'exit code {code}'}"))

    def _tell(self, record: Mapping[str, Any]) -> None:
        """Print how a run ended, how many are done, and when the rest will be, by the rate of steps so far."""
        expected = self.study.expected()
        done = [r for r in self.results.values() if r["status"] != "failed"]
        left = max(0, sum(expected) - sum(r["steps"] for r in done))
        eta = (time.monotonic() - self.begin) / self.steps_done * left
        words = {
            "done": f"loss {record['loss'] or math.nan:.4f}",
            "diverged": "diverged",
            "failed": "failed: " + record["error"],
        }
        say(
            f"[{len(done)}/{len(expected)}] {record['run']}: {words[record['status']]} in {record['seconds']:.0f} s; "
            f"ETA {eta / 60:.0f} min"
        )


def outcome(workdir: Path, steps: int, code: int, said: Sequence[str]) -> dict[str, Any]:
    """Return status, losses, parameters, revision and error of a run that ended with `code`."""
    found: dict[str, Any] = dict(status="failed", loss=None, losses={}, parameters=None, git=None, exit=code, error="")
    if code not in (0, DIVERGED_EXIT):
        return found | dict(error="\n".join(said[-5:]) or f"exit code {code}")
    found["git"] = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["git"]
    if code == DIVERGED_EXIT:
        return found | dict(status="diverged", error=said[-1] if said else "")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {line["split"]: line["loss"] for line in lines if line["step"] == steps}
    loss = next(value for split, value in losses.items() if split != "train")
    arrays = json.loads((workdir / "checkpoints" / str(steps) / "meta.json").read_text(encoding="utf-8"))["arrays"]
    parameters = sum(math.prod(a["shape"]) for name, a in arrays.items() if name.startswith("params/"))
    status = "diverged" if loss is None else "done"
    return found | dict(status=status, loss=loss, losses=losses, parameters=parameters)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, sd / sqrt(n) with n - 1 in the sd; NaN where there is none."""
    finite = bool(values) and all(map(math.isfinite, values))
    mean = statistics.fmean(values) if finite else (math.inf if values else math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values)) if finite and len(values) > 1 else math.nan
    return mean, error


def at_edge(best: float | None, values: Sequence[float]) -> str:
    """Say which end of the list the best value is; "" if it is inside, or there was no choice."""
    if best is None or len(values) < 2 or best not in (values[0], values[-1]):
        return ""
    return "smallest" if best == values[0] else "largest"


def report(study: Study, results: Results) -> str:
    """Return both tables and what to know about them, in Markdown."""
    parts = [markdown(*main_table(study, results))]
    if study.values:
        parts.append(markdown(*sweep_table(study, results)))
    return "\n\n".join([*parts, *notes(study, results)])


def main_table(study: Study, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: a combination each, at its best value."""
    seeds = range(study.seeds)
    swept = [study.key] if study.values else []
    head = ["", *swept, "loss", *(f"seed {s}" for s in seeds), "difference", "parameters", "minutes"]
    rows, first = [], None
    for c in study.combinations:
        best = study.best(c, results)
        records = [results.get(job.name) for job in study.full(c, results)] or [None] * study.seeds
        losses = [loss_of(record) for record in records]
        first = losses if first is None else first
        pairs = [b - a for a, b in zip(first, losses, strict=True) if a is not None and b is not None]
        known = [record for record in records if record and record["status"] != "failed"]
        parameters = next((f"{r['parameters']:,}" for r in known if r["parameters"]), "")
        minutes = f"{statistics.fmean(r['seconds'] for r in known) / 60:.1f}" if known else ""
        mean = spread([x for x in losses if x is not None])
        value = (
            [str(best if best is not None else "none") + " (edge)" * bool(at_edge(best, study.values))] if swept else []
        )
        difference = "" if losses is first else spread(pairs, "+")
        rows.append([c.label, *value, mean, *map(number, losses), difference, parameters, minutes])
    return head, rows


def sweep_table(study: Study, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: a combination each, a column for every swept value, the best one bold."""
    rows = []
    for c in study.combinations:
        best = study.best(c, results)
        cells = [(job.value, number(loss_of(results.get(job.name)))) for job in study.sweep(c)]
        rows.append([c.label, *(f"**{text}**" if value == best else text for value, text in cells)])
    return [study.key, *map(str, study.values)], rows


def notes(study: Study, results: Results) -> list[str]:
    """Return the sentences under the tables."""
    found = []
    for c in study.combinations:
        edge = at_edge(study.best(c, results), study.values)
        if edge:
            value = study.best(c, results)
            found.append(
                f"The best {study.key} of {c.label}, {value}, is the {edge} tried: give --sweep values beyond it."
            )
    jobs = [job for c in study.combinations for job in [*study.sweep(c), *study.full(c, results)]]
    records = [results[job.name] for job in jobs if job.name in results]
    failed = sorted({r["run"] for r in records if r["status"] == "failed"})
    if failed:
        found.append(f"Failed, to be tried again by the same command: {', '.join(failed)}.")
    missing = len({job.name for job in jobs} - set(results))
    if missing:
        found.append(f"{missing} runs are yet to come.")
    revisions = sorted({r["git"] for r in records if r["git"]})
    return found + ([f"Revision: {', '.join(revisions)}."] if revisions else [])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table, columns aligned for reading as text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if i == 0 else "-" * (max(w, 2) - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def number(loss: float | None) -> str:
    """Write a loss; an infinite one is a run that diverged, None one that failed or is yet to come."""
    return "–" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Write mean ± standard error."""
    mean, error = mean_error(values)
    if not math.isfinite(mean):
        return "diverged" if values else "–"
    return f"{mean:{sign}.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def main(args: flags.FlagValues) -> None:
    """Run what is missing, then print the tables."""
    out = Path(args.out)
    if args.table_only:
        study = read_plan(out)
        print(report(study, read_results(out / RESULTS)))
        return
    study = plan(args)
    with sole_user(out) as lock:
        open_folder(out, study)
        runner = Runner(study, out, args.jobs, lock)
        with stop_signals(runner):
            runner([job for c in study.combinations for job in study.sweep(c)])
            runner([job for c in study.combinations for job in study.full(c, runner.results)])
    if study.values:
        plot(study, runner.results, out / PLOT)
    print(report(study, runner.results))
    failed = [name for name, record in runner.results.items() if record["status"] == "failed"]
    if failed:
        raise AetherError(
            f"{len(failed)} runs failed: {', '.join(failed)}; see {out / 'logs'}, then run the same command again."
        )


@contextlib.contextmanager
def stop_signals(runner: Runner) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C stop the runs, which save."""

    def note(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        runner.stop(Stopped(f"Stopped by {name}; every run is saved: the same command goes on."))

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def plot(study: Study, results: Results, path: Path) -> None:
    """Draw the losses of the sweep, a line for each combination; runs that diverged are crosses at the top."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for c in study.combinations:
        losses = [loss_of(results.get(job.name)) for job in study.sweep(c)]
        points = list(zip(study.values, losses, strict=True))
        finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        (line,) = (
            axis.plot(*zip(*finite, strict=True), "o-", label=c.label) if finite else axis.plot([], [], label=c.label)
        )
        lost = [x for x, y in points if y is not None and math.isinf(y)]
        axis.plot(lost, [0.98] * len(lost), "x", color=line.get_color(), transform=axis.get_xaxis_transform())
        best = [(x, y) for x, y in finite if x == study.best(c, results)]
        axis.plot(*zip(*best, strict=True), "o", ms=13, mfc="none", color=line.get_color()) if best else None
    if study.values[0] > 0:
        axis.set_xscale("log")
    axis.set_xticks(study.values, [f"{value:g}" for value in study.values])
    axis.minorticks_off()
    axis.set_xlabel(study.key)
    axis.set_ylabel("final validation loss (nats)")
    axis.grid(color="#e4e7eb")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags(config=True)
    flags.DEFINE_multi_string("vary", [], "KEY=VALUE,VALUE: settings to compare; given again: all combinations", values)
    flags.DEFINE_string(
        "sweep", "", "KEY=NUMBER,NUMBER: of these each combination takes its best (empty: no sweep)", values
    )
    flags.DEFINE_float("sweep_fraction", 0.5, "share of the steps in the sweep", 1e-6, 1.0, values)
    flags.DEFINE_integer("seeds", 3, "seeds of the final runs", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "jobs", 1, "runs at a time, the cores shared out among them", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("out", "runs/study", "folder for the runs, results.jsonl and sweep.png", values)
    flags.DEFINE_bool("table_only", False, "print the tables of what is done in --out", values)
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
