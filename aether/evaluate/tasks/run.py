"""Score a run on tasks, and leave the results where a person finds them."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from aether.config import dumps, finite
from aether.data.tokenizers import Tokenizer
from aether.errors import InputError, StorageError
from aether.evaluate.likelihood import Scorer
from aether.evaluate.load import Run, load_run
from aether.evaluate.tasks.examples import choice, lambada, pairs
from aether.evaluate.tasks.task import Options, Task
from aether.evaluate.tasks.texts import documents, sliding
from aether.events import TensorBoard
from aether.workdir import Workdir

TASKS: dict[str, Callable[[str, Tokenizer, Options], Task]] = dict(
    lambada=lambada, choice=choice, pairs=pairs, documents=documents, sliding=sliding
)


def evaluate_tasks(
    workdir: str, words: Sequence[str], *, step: int | None = None, stride: int | None = None, average: str = "auto"
) -> dict[str, Any]:
    """Score a checkpoint of a language model on tasks; return step, average, and by label what each reports.

    Each result is also left in the run's folder as evaluation/LABEL-STEP.json, and for TensorBoard. A label is the
    task's name and the file's; with an average that was asked for, that too.

    Args:
      workdir: of the run.
      words: NAME:PATH each, of a task in `TASKS` and its file.
      step: of the checkpoint; the last by default.
      stride: of `sliding`, in tokens.
      average: see `load_run`.

    Raises:
      InputError: no such run, task or file, or a line that is not what the task takes; before anything is scored.
    """
    named = labelled(words)
    if stride is not None and not any(name == "sliding" for name, _ in named.values()):
        raise InputError(f"--stride is {stride}, but no --task is sliding:PATH; leave it out, or add one.")
    run = load_run(workdir, step, average=average)
    tokenizer = language_model(run, "--task")
    options = Options(run.config.data, stride)
    tasks = {label: _open(name, path, tokenizer, options) for label, (name, path) in named.items()}
    scorer, about = Scorer(run), dict(step=run.step, average=run.average)
    found: dict[str, dict[str, Any]] = {}
    for label, task in tasks.items():
        name, path = named[label]
        metrics = task.summarise(scorer(task.requests, label))
        numbers = {n: value for key, e in metrics.items() for n, value in ((key, e.value), (f"{key}_stderr", e.stderr))}
        found[label] = dict(task=name, path=path, **task.counts, **numbers)
    if jax.process_index() == 0:
        asked = "" if average == "auto" else "-" + average.replace(":", "")
        _leave(workdir, run.step, {label + asked: about | result for label, result in found.items()})
    return about | dict(tasks=found)


def labelled(words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return label -> (name, path) of NAME:PATH each; the same twice is once.

    Raises:
      InputError: no such task, no path, or two files of one label.
    """
    found: dict[str, tuple[str, str]] = {}
    for word in words:
        name, _, path = word.partition(":")
        if name not in TASKS:
            raise InputError(f"--task is {word!r}, and there is no task {name!r}; there are {', '.join(TASKS)}.")
        if not path:
            raise InputError(f"--task is {word!r}; it takes NAME:PATH, for example --task={name}:my.jsonl.")
        stem = os.path.basename(path.rstrip("/")).partition(".")[0] or "all"
        label = f"{name}-{''.join(c if c.isalnum() or c in '-_' else '_' for c in stem)}"
        if found.setdefault(label, (name, path)) != (name, path):
            raise InputError(
                f"--task has {found[label][1]} and {path}, whose results would both be called {label}; rename one."
            )
    return found


def language_model(run: Run, flag: str) -> Tokenizer:
    """Return the tokenizer of a language model, or refuse another."""
    kind = run.config.model.kind
    if run.config.model.task != "lm" or run.tokenizer is None:
        raise InputError(
            f"{flag} takes a language model, model.kind=aether or gpt2, but {run.workdir} is a run of {kind}."
        )
    return run.tokenizer


def _open(name: str, path: str, tokenizer: Tokenizer, options: Options) -> Task:
    try:
        return TASKS[name](path, tokenizer, options)
    except (InputError, StorageError) as e:
        raise type(e)(f"--task={name}:{path}: {e}") from e


def _leave(workdir: str, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the results into the run's folder; they are worth more than files that nobody asked for."""
    try:
        home = Workdir(workdir, primary=False)
        for label, result in results.items():
            home.leave(f"evaluation/{label}-{step}.json", dumps(finite(result)).encode())
        with tempfile.TemporaryDirectory() as folder:
            board = TensorBoard(Path(folder))
            for label, result in results.items():
                board.scalars(step, time.time(), label, {k: result[k] for k in result if f"{k}_stderr" in result})
            board.close()
            for file in Path(folder).iterdir():
                home.leave(f"tensorboard/{file.name}", file.read_bytes())
    except (OSError, StorageError) as e:
        print(f"warning: the results are not kept in the run's folder: {e}", file=sys.stderr)
