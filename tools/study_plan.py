"""What a study consists of: its combinations and runs, their configs, and their results on disk."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags

from aether.config import build, differences, dumps, knobs
from aether.errors import InputError
from aether.storage import write_atomic
from launch import cli, overrides

QUIET = ["train.log_every=100", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=0"]
PLAN, RESULTS = "study.json", "results.jsonl"

Results = Mapping[str, Mapping[str, Any]]  # of each run by name, the last line that it has in results.jsonl


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
    score: str = "loss"

    def score_of(self, record: Mapping[str, Any] | None) -> float | None:
        """Return what decides, the lower the better; infinite if the run diverged, None if it failed or is to come.

        Raises:
          InputError: the record is of an earlier version, which did not write the accuracy.
        """
        if record is None or record["status"] == "failed":
            return None
        if record["status"] == "diverged":
            return math.inf
        if self.score == "loss":
            return record["loss"]
        if record.get("accuracy") is None:
            raise InputError(
                f"{RESULTS} has no accuracy of {record['run']}, which an earlier version wrote; leave --score=error "
                "out, or give another --out."
            )
        return 100.0 * (1.0 - record["accuracy"])

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
        """Return the value with the lowest score so far; None where no run has a finite one, or nothing is swept."""
        losses = {job.value: self.score_of(results.get(job.name)) for job in self.sweep(c)}
        finite = {value: loss for value, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(finite, key=lambda value: finite[value]) if finite else None

    def full(self, c: Combination, results: Results) -> list[Job]:
        """List the whole runs of a combination at its best value; none while there is no such value."""
        value = self.best(c, results)
        if self.values and value is None:
            return []
        return [self.job(c, value, seed, c.steps) for seed in range(self.seeds)]

    def jobs(self, results: Results) -> dict[str, Job]:
        """Return all runs by name, as far as the best values are known."""
        return {job.name: job for c in self.combinations for job in [*self.sweep(c), *self.full(c, results)]}

    def expected(self) -> list[int]:
        """Return the steps of every run, also of those whose value is not known yet."""
        steps = [c.sweep_steps for c in self.combinations for _ in self.values]
        for c in self.combinations:
            shared = bool(self.values) and c.steps == c.sweep_steps  # seed 0 has been run by the sweep
            steps += [c.steps] * (self.seeds - shared)
        return steps


def plan(args: flags.FlagValues) -> Study:
    """Make the study that the flags describe, every config of it checked."""
    path = cli.require(args, "config", "configs/shakespeare_char.py")
    shared = [*QUIET, *args.override]
    base = overrides.make_config(path, shared)
    if not (base.data.validation or base.data.validation_fraction):
        raise InputError("data.validation is empty and data.validation_fraction 0; a study needs validation data.")
    if base.optim.schedule_steps:
        raise InputError(
            f"optim.schedule_steps is {base.optim.schedule_steps}; set it to 0: it follows train.steps here."
        )
    vary = [split_list("vary", word) for word in args.vary]
    key, texts = split_list("sweep", args.sweep) if args.sweep else ("", [])
    taken = [name for name, _ in vary] + [key, "train.seed"]
    for name in taken:
        if taken.count(name) > 1:
            raise InputError(f"{name} is set twice; --vary, --sweep and --seeds (train.seed) take keys of their own.")
    values = sweep_values(key, texts) if key else []
    chosen = itertools.product(*([(name, text) for text in options] for name, options in vary))
    combinations = [combination(path, shared, choice, args.sweep_fraction) for choice in chosen]
    study = Study(path, shared, base.to_json(), combinations, key, values, args.seeds, args.score)
    check_configs(study)
    return study


def combination(path: str, shared: list[str], choice: Sequence[tuple[str, str]], fraction: float) -> Combination:
    """Make a combination of (key, value) pairs, or of none: what the config file says."""
    label = ",".join(f"{key.split('.', 1)[-1]}={text}" for key, text in choice) or Path(path).stem
    own = [f"{key}={text}" for key, text in choice]
    steps = overrides.make_config(path, [*shared, *own]).train.steps
    return Combination(label, own, steps, max(1, round(steps * fraction)))


def split_list(flag: str, word: str) -> tuple[str, list[str]]:
    """Split KEY=VALUE,VALUE into the key and the values."""
    key, _, text = word.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key or not all(values):
        raise InputError(f"--{flag} is {word!r}; write --{flag}=KEY=VALUE,VALUE.")
    return key, values


def sweep_values(key: str, texts: Sequence[str]) -> list[float]:
    """Return the swept numbers in rising order."""
    kind = {k: f.type for k, f in knobs()}.get(key)
    if kind is None:
        raise InputError(f"--sweep names {key}, which is no key of the config; optim.learning_rate is one.")
    if kind not in (int, float):
        raise InputError(f"--sweep names {key}, which is not a number; give it to --vary.")
    return sorted(overrides.parse(key, text, kind) for text in texts)


def check_configs(study: Study) -> None:
    """Build the config of every run, and refuse two runs of one name."""
    names = set()
    for c in study.combinations:
        for job in study.sweep(c) or study.full(c, {}):
            made = overrides.make_config(study.config, job.overrides)
            made.resolved(made.model.vocab or 1)  # the tokenizer's vocabulary is not known yet
            if job.name in names:
                raise InputError(f"Two runs would be called {job.name}; give every value of --vary and --sweep once.")
            names.add(job.name)


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of every run by its name; a torn line is left out."""
    path, records = out / RESULTS, {}
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
    """Write the plan down, cut off a torn line; refuse a folder whose runs had another base, their length aside."""
    if (out / PLAN).exists():
        for key, was, now, free in differences(build(read_plan(out).base), build(study.base)):
            if key == "train.eval_batches" or not free:
                raise InputError(f"The study in {out} has {key}={was!r}, this one {now!r}; give another --out.")
    write_atomic(out / PLAN, dumps(asdict(study)).encode())
    lines = (out / RESULTS).read_bytes().splitlines(keepends=True) if (out / RESULTS).exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        write_atomic(out / RESULTS, b"".join(lines[:-1]))
