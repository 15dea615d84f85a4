"""Runs the jobs of a study side by side, each a `launch.train` of its own or several as one program, and writes down
how they ended.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import math
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from aether.config import build
from aether.errors import AetherError, InputError, Stopped, StorageError
from aether.storage import storage_errors
from aether.train.flops import flops_per_step
from tools.study_plan import RESULTS, Job, Study, read_results

TRAIN = [sys.executable, "-m", "launch.train"]
TOGETHER = [sys.executable, "-m", "tools.study_together"]
DIVERGED_EXIT = 3  # too many non-finite steps in a row
FATAL = {2: InputError, 74: StorageError}  # what the next run would end with too


class Runner:
    """Runs jobs, `jobs` at a time and each on its share of the cores.

    Args:
      study: what the jobs belong to.
      out: its folder.
      jobs: how many at a time.
      lock: file descriptor that the runs inherit, see `sole_user`.
      together: runs that differ in seed and learning rate alone are one program, up to so many of them.
    """

    def __init__(self, study: Study, out: Path, jobs: int, lock: int, together: int = 1):
        self.study, self.out, self.jobs, self.lock, self.together = study, out, jobs, lock, together
        self.results = read_results(out)
        self.cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for group in cpu_groups(jobs):
            self.cores.put(group)
        self.guard = threading.Lock()
        self.children: set[subprocess.Popen] = set()
        self.end: AetherError | None = None  # why no more runs start
        self.begin, self.steps_made = time.monotonic(), 0
        with storage_errors(out):
            (out / "logs").mkdir(exist_ok=True)

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Run what is not done yet, failed runs again; raise what ended it early."""
        todo = [j for j in jobs if self.results.get(j.name, {}).get("status") not in ("done", "diverged")]
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(self._run, group) for group in self._groups(todo)]:
                future.result()
        if self.end:
            raise self.end

    def stop(self, why: AetherError) -> None:
        """Start no more runs, and let those under way save and end."""
        with self.guard:
            self.end = self.end or why
            for child in self.children:
                child.terminate()

    def _groups(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Return the jobs by what runs as one program."""
        alike: dict[Any, list[Job]] = {}
        for job in jobs:
            alike.setdefault((job.combination, job.steps), []).append(job)
        n = self.together
        return [each[i : i + n] for each in alike.values() for i in range(0, len(each), n)]

    def _run(self, group: Sequence[Job]) -> None:
        cores = self.cores.get()
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # of this thread; the child inherits it, and sizes XLA's pool by it
            self._train(group)
        except Exception as error:
            self.stop(error if isinstance(error, AetherError) else AetherError(f"{group[0].name}: {error!r}"))
            raise
        finally:
            self.cores.put(cores)

    def _train(self, group: Sequence[Job]) -> None:
        first, begin = group[0], time.monotonic()
        workdir = self.out / first.name
        command = [*(TRAIN if self.together == 1 else TOGETHER), f"--config={self.study.config}"]
        command += [f"--config.{o}" for o in first.overrides]
        if self.together == 1:
            command.append(f"--workdir={workdir}")
        else:
            copies = [dict(run=job.name, value=job.value, seed=job.seed) for job in group]
            command += [f"--copies={json.dumps(copies)}", f"--result={workdir}.json"]
        path = self.out / "logs" / f"{first.name}.txt"
        with storage_errors(path), open(path, "ab+") as log:
            offset = log.seek(0, os.SEEK_END)
            code = self._wait(command, log, group)
            log.seek(offset)
            said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        if code is None or (code and self.end):
            return
        how = dict(seconds=round((time.monotonic() - begin) / len(group), 1), command=shlex.join(command))
        for job in group:
            if self.together == 1:
                ended = outcome(workdir, job.steps, code, said)
            else:
                ended = outcome_together(Path(f"{workdir}.json"), job, code, said)
            record = dict(run=job.name, combination=job.combination, key=self.study.key, value=job.value, seed=job.seed)
            self._write(record | dict(steps=job.steps, **ended) | how)
        if code in FATAL:
            self.stop(FATAL[code](f"{first.name}: {said[-1].removeprefix('error: ') if said else f'exit code {code}'}"))

    def _wait(self, command: list[str], log: IO[bytes], group: Sequence[Job]) -> int | None:
        """Return the exit code of a command; None if the study ended before it began."""
        with self.guard:
            if self.end:
                return None
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self.lock], process_group=0
            )
            self.children.add(child)
        say(f"start {group[0].name}" + f" and {len(group) - 1} more" * (len(group) > 1))
        code = child.wait()
        with self.guard:
            self.children.discard(child)
        return code

    def _write(self, record: dict[str, Any]) -> None:
        with self.guard, storage_errors(self.out / RESULTS):
            with open(self.out / RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.results[record["run"]] = record
            self._tell(record)

    def _tell(self, record: Mapping[str, Any]) -> None:
        """Print how a run ended, how many are done, and when the rest will be, by the steps made so far."""
        failed = record["status"] == "failed"
        how = (
            record["status"] if record["loss"] is None else f"loss {record['loss']:.4f}, {record['accuracy']:.2%} right"
        )
        done = [self.results[name] for name in self.study.jobs(self.results) if name in self.results]
        done = [r for r in done if r["status"] != "failed"]
        expected = self.study.expected()
        self.steps_made += 0 if failed else record["steps"]
        eta = ""
        if self.steps_made:
            left = sum(expected) - sum(r["steps"] for r in done)
            eta = f"; ETA {(time.monotonic() - self.begin) / self.steps_made * left / 60:.1f} min"
        say(f"[{len(done)}/{len(expected)}] {record['run']}: {how} in {record['seconds']:.0f} s{eta}")
        if failed:
            say(f"  {record['error']}")


def outcome(workdir: Path, steps: int, code: int, said: Sequence[str]) -> dict[str, Any]:
    """Return how a run that ended with `code` did; `tokens_per_second`, of images `images_per_second`, is the median of
    its train lines.
    """
    found: dict[str, Any] = dict(status="failed", loss=None, accuracy=None, losses={}, parameters=None)
    found |= dict(git=None, flops=None, exit=code, error="")
    if code not in (0, DIVERGED_EXIT):
        return found | dict(error="\n".join(said[-5:]) or f"exit code {code}")
    made = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    found["git"], found["flops"] = made["git"], steps * flops_per_step(build(made["config"]))
    if code == DIVERGED_EXIT:
        return found | dict(status="diverged", error=said[-1] if said else "")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {line["split"]: line for line in lines if line["step"] == steps}
    validation = [line for split, line in last.items() if split != "train"]
    if not validation:
        raise InputError(f"{workdir} has no validation loss; give a text or images by data.validation.NAME.")
    arrays = json.loads((workdir / "checkpoints" / str(steps) / "meta.json").read_text(encoding="utf-8"))["arrays"]
    parameters = sum(math.prod(a["shape"]) for name, a in arrays.items() if name.startswith("params/"))
    loss, accuracy = validation[0]["loss"], validation[0]["accuracy"]
    found |= dict(status="diverged" if loss is None else "done", loss=loss, accuracy=accuracy, parameters=parameters)
    found |= dict(losses={split: line["loss"] for split, line in last.items()})
    rates = [name for name in last["train"] if name.endswith("_per_second")]
    return found | {
        name: round(statistics.median(line[name] for line in lines if line["split"] == "train")) for name in rates
    }


def outcome_together(path: Path, job: Job, code: int, said: Sequence[str]) -> dict[str, Any]:
    """Return how one of several runs of a program that ended with `code` did."""
    found: dict[str, Any] = dict(status="failed", loss=None, accuracy=None, losses={}, parameters=None)
    found |= dict(git=None, flops=None, exit=code, error="")
    if code:
        return found | dict(error="\n".join(said[-5:]) or f"exit code {code}")
    made = json.loads(path.read_text(encoding="utf-8"))
    own = made["runs"][job.name]
    found |= dict(git=made["git"], flops=job.steps * flops_per_step(build(made["config"])), **own)
    return found | dict(error="" if own["status"] == "done" else "too many non-finite steps in a row")


def cpu_groups(jobs: int) -> list[set[int]]:
    """Share the cores out among the jobs; empty sets where the system cannot pin."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(jobs)]
    cpus = sorted(os.sched_getaffinity(0))
    return [set(cpus[i::jobs]) or {cpus[i % len(cpus)]} for i in range(jobs)]


@contextlib.contextmanager
def sole_user(out: Path) -> Iterator[int]:
    """Hold the folder's lock and yield its descriptor; runs inherit it, so those of a killed study are waited for."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another study in {out}, or for runs that it left behind")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextlib.contextmanager
def stop_signals(runner: Runner) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C stop the runs, which save, and then the study."""

    def note(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        say(f"{name}: waiting for the runs to save")
        runner.stop(Stopped(f"Stopped by {name}; the runs are saved, the same command goes on."))

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
