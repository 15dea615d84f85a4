"""What a study consists of: its combinations and runs, their configs, and their results on disk."""

import contextlib
import itertools
import json
import math
import re
import tomllib
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
    """One choice of the --cases and --vary values, as overrides, and the steps of its runs.

    `group` is its case, or its choice of the first --vary: what one line of the picture of the compute is of.
    """

    label: str
    overrides: list[str]
    steps: int
    sweep_steps: int
    group: str = ""


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
    rungs: int = 1
    finalists: int = 0

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

    def ladder(self, results: Results) -> list[list[Job]]:
        """List the runs of each rung of the sweep, as far as the rung before decides: with seed 0, the last rung with
        the sweep's steps and every one before with half as many as the next.

        From rung to rung each combination keeps the better half of its values (Jamieson and Talwalkar, 2016), and with
        `finalists` the better half of the combinations stay, no fewer than that, and the first one, which the others
        are compared with.
        """
        choices: Sequence[float | None] = self.values or ([None] if self.finalists else [])
        alive = {c.label: list(choices) for c in self.combinations if choices}
        rungs: list[list[Job]] = []
        for rung in range(self.rungs if alive else 0):
            made = {c.label: c for c in self.combinations if c.label in alive}
            rungs.append([self.job(c, v, 0, self.rung_steps(c, rung)) for c in made.values() for v in alive[c.label]])
            scores = self._scores(rungs[-1], results)
            if scores is None:
                break
            values = {label: sorted(alive[label], key=lambda v, s=scores[label]: s[v]) for label in alive}
            halves = {label: ranked[: math.ceil(len(ranked) / 2)] for label, ranked in values.items()}
            stay = self._leading(scores, max(self.finalists, math.ceil((len(alive) - 1) / 2)))
            alive = {label: [v for v in alive[label] if v in halves[label]] for label in alive if label in stay}
        return rungs

    def _scores(self, rung: Sequence[Job], results: Results) -> dict[str, dict[float | None, float]] | None:
        """Return the scores of a rung's runs by combination and value; None while one is missing."""
        scores: dict[str, dict[float | None, float]] = {}
        for job in rung:
            score = self.score_of(results.get(job.name))
            if score is None:
                return None
            scores.setdefault(job.combination, {})[job.value] = score
        return scores

    def _leading(self, scores: Mapping[str, Mapping[Any, float]], count: int) -> set[str]:
        """Return the first combination and the best `count` others; all where every one is to be kept."""
        if not self.finalists:
            return set(scores)
        first = self.combinations[0].label
        others = sorted(scores.keys() - {first}, key=lambda label: min(scores[label].values()))
        return {first, *others[:count]}

    def rung_steps(self, c: Combination, rung: int) -> int:
        """Return the steps of a combination's runs in a rung."""
        return max(1, round(c.sweep_steps / 2 ** (self.rungs - 1 - rung)))

    def sweep(self, c: Combination, results: Results) -> list[Job]:
        """List the runs that find a combination's best value, as far as they are known, the shortest first."""
        return [job for rung in self.ladder(results) for job in rung if job.combination == c.label]

    def best(self, c: Combination, results: Results) -> Job | None:
        """Return the run with the lowest score in the longest rung so far; None where none has a finite one."""
        return self._best(c, self.ladder(results), results)

    def _best(self, c: Combination, ladder: Sequence[Sequence[Job]], results: Results) -> Job | None:
        found: Job | None = None
        for rung in ladder:
            scored = [(self.score_of(results.get(job.name)), job) for job in rung if job.combination == c.label]
            finite = [(score, job) for score, job in scored if score is not None and math.isfinite(score)]
            found = min(finite, key=lambda pair: pair[0])[1] if finite else found
        return found

    def finals(self, results: Results) -> dict[str, Job | None]:
        """Return which combinations get whole runs, by label, and the run of the sweep with the best value of each.

        That are all, or the first and the best `finalists` once they are known. A combination none of whose sweep's
        runs has ended well gets none.
        """
        ladder = self.ladder(results)
        if not ladder:
            return {c.label: None for c in self.combinations}
        if len(ladder) < self.rungs:
            return {}
        best = {c.label: self._best(c, ladder, results) for c in self.combinations}
        stay = set(best)
        if self.finalists:
            scores = self._scores(ladder[-1], results)
            stay = self._leading(scores, self.finalists) if scores else set()
        return {label: job for label, job in best.items() if job and label in stay}

    def full(self, c: Combination, results: Results) -> list[Job]:
        """List the whole runs of a combination at its best value; none while it is not known to get any."""
        return self._full(c, self.finals(results))

    def _full(self, c: Combination, finals: Mapping[str, Job | None]) -> list[Job]:
        if c.label not in finals:
            return []
        best = finals[c.label]
        return [self.job(c, best.value if best else None, seed, c.steps) for seed in range(self.seeds)]

    def jobs(self, results: Results) -> dict[str, Job]:
        """Return all runs by name, as far as the best values are known."""
        finals = self.finals(results)
        whole = [job for c in self.combinations for job in self._full(c, finals)]
        return {job.name: job for rung in [*self.ladder(results), whole] for job in rung}

    def expected(self) -> list[int]:
        """Return the steps of every run, also of those that are not known yet."""
        n = len(self.values) or bool(self.finalists)
        alive, steps = list(self.combinations), []
        for rung in range(self.rungs if n else 0):
            steps += [self.rung_steps(c, rung) for c in alive for _ in range(n)]
            if rung < self.rungs - 1:
                n = math.ceil(n / 2)
                keep = 1 + max(self.finalists, math.ceil((len(alive) - 1) / 2)) if self.finalists else len(alive)
                alive = alive[:keep]
        if self.finalists:
            alive = alive[: 1 + self.finalists]
        for c in alive:
            shared = bool(n) and c.steps == c.sweep_steps  # seed 0 has been run by the sweep
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
    if args.rungs > 1 and not (args.sweep or args.finalists):
        raise InputError(f"--rungs is {args.rungs} with nothing to choose from; give --sweep or --finalists too.")
    vary = [split_list("vary", word) for word in args.vary]
    cases = read_cases(args.cases) if args.cases else []
    key, texts = split_list("sweep", args.sweep) if args.sweep else ("", [])
    taken = [name for name, _ in vary] + [key, "train.seed"]
    for name in taken:
        if taken.count(name) > 1:
            raise InputError(f"{name} is set twice; --vary, --sweep and --seeds (train.seed) take keys of their own.")
    values = sweep_values(key, texts) if key else []
    options = [[(f"{key.split('.', 1)[-1]}={text}", [f"{key}={text}"]) for text in texts] for key, texts in vary]
    chosen = itertools.product(*([cases] if cases else []), *options)
    combinations = [combination(path, shared, choice, args.sweep_fraction) for choice in chosen]
    if args.finalists and args.finalists >= len(combinations):
        raise InputError(
            f"--finalists is {args.finalists} of {len(combinations)} combinations, the first of which stays anyway; "
            f"give a number below {len(combinations)}, or more to choose from with --cases or --vary."
        )
    how = dict(score=args.score, rungs=args.rungs, finalists=args.finalists)
    study = Study(path, shared, base.to_json(), combinations, key, values, args.seeds, **how)
    check_configs(study)
    return study


def combination(path: str, shared: list[str], choice: Sequence[tuple[str, list[str]]], fraction: float) -> Combination:
    """Make a combination of (label, overrides) pairs, or of none: what the config file says."""
    label = ",".join(name for name, _ in choice) or Path(path).stem
    own = [override for _, overrides in choice for override in overrides]
    steps = overrides.make_config(path, [*shared, *own]).train.steps
    return Combination(label, own, steps, max(1, round(steps * fraction)), choice[0][0] if choice else label)


def read_cases(path: str) -> list[tuple[str, list[str]]]:
    """Return name and overrides of each case of a TOML file: a table for every case, its entries KEY = VALUE.

    Raises:
      InputError: the file is missing, is not TOML, or holds something else than such tables.
    """
    try:
        made = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--cases is {path}, which cannot be read as TOML: {error}.") from None
    for name, entries in made.items():
        if not isinstance(entries, dict) or any(isinstance(value, dict | list) for value in entries.values()):
            raise InputError(
                f"--cases is {path}, where {name} is not a table of settings; write [{name}] and under it "
                "lines such as 'model.epsilon' = 0.1."
            )
    if not made:
        raise InputError(f"--cases is {path}, which has no table; write [NAME] and under it 'KEY' = VALUE.")
    return [(name, [f"{key}={value}" for key, value in entries.items()]) for name, entries in made.items()]


def split_list(flag: str, word: str) -> tuple[str, list[str]]:
    """Split KEY=VALUE,VALUE into the key and the values."""
    key, _, text = word.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key or not all(values):
        raise InputError(f"--{flag} is {word!r}; write --{flag}=KEY=VALUE,VALUE.")
    return key, values


def sweep_values(key: str, texts: Sequence[str], flag: str = "sweep") -> list[float]:
    """Return the numbers that a flag gives for a key, in rising order."""
    kind = {k: f.type for k, f in knobs()}.get(key)
    if kind is None:
        raise InputError(f"--{flag} names {key}, which is no key of the config; optim.learning_rate is one.")
    if kind not in (int, float):
        raise InputError(
            f"--{flag} names {key}, which is not a number" + ("; give it to --vary." if flag == "sweep" else ".")
        )
    return sorted(overrides.parse(key, text, kind) for text in texts)


def check_configs(study: Study) -> None:
    """Build the config of every run, and refuse two runs of one name."""
    names = set()
    for c in study.combinations:
        for job in study.sweep(c, {}) or study.full(c, {}):
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


def read_plan(out: Path, flag: str = "out") -> Study:
    """Return the study that a folder, given by a flag, holds."""
    if not (out / PLAN).exists():
        raise InputError(f"--{flag} is {out}, which holds no study; give the --out of one that was begun.")
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
