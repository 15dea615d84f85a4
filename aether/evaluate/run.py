"""Score a run that is on disk."""

import dataclasses
import sys
from typing import Any

import jax
from tqdm import tqdm

from aether.data.loader import load_corpus, load_validation, window_batches
from aether.data.pack import Windows
from aether.errors import InputError
from aether.evaluate.load import Run, load_run
from aether.evaluate.metrics import bound_loss, make_scorer
from aether.losses import LOSSES
from aether.workdir import Workdir


def evaluate_run(workdir: str, *, step: int | None = None, data: str | None = None, batches: int = 0) -> dict[str, Any]:
    """Score a checkpoint (the last by default) on a text; return step, data and the scores of `make_scorer`.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      data: a path as in `data.path`, or the name of one of the run's validation sets; by default the first of them.
      batches: how many, spread evenly over the text; 0 for all of it.

    Raises:
      InputError: no such run, checkpoint or text.
    """
    run = load_run(workdir, step)
    name, windows = _text(run, data)
    config = dataclasses.replace(run.config.data, batch_size=_rows(run))
    loss = bound_loss(LOSSES["lm"], run.config.train.loss_chunk)
    score = make_scorer(run.graph, loss, run.tokenizer.token_bytes, run.mesh)
    total = -(-len(windows) // config.batch_size)
    shown = tqdm(
        window_batches(windows, config, batches),
        total=min(batches or total, total),
        desc=name,
        unit="batch",
        file=sys.stderr,
        disable=not sys.stderr.isatty() or jax.process_index() > 0,
    )
    return {"step": run.step, "data": name, **score(run.params, shown)}


def _text(run: Run, data: str | None) -> tuple[str, Windows]:
    c = run.config.data
    named = c.validation or ({} if c.mixture or not c.validation_fraction else {"validation": ""})
    if data and data not in named:
        return data, load_validation(data, c, run.tokenizer)
    if c.validation:
        name = data or next(iter(c.validation))
        return name, load_validation(c.validation[name], c, run.tokenizer)
    corpus = load_corpus(c)
    began = Workdir(run.workdir, primary=False).read_json("config.json")["data_fingerprint"]
    if corpus.fingerprint != began:
        raise InputError(
            f"The texts of data.path have changed since the run in {run.workdir} began (fingerprint {began[:8]} then, "
            f"{corpus.fingerprint[:8]} now); restore them, or name a text by --data."
        )
    if not corpus.validation:
        raise InputError(f"The run in {run.workdir} has no validation text; give one by --data.")
    name = data or next(iter(corpus.validation))
    return name, corpus.validation[name]


def _rows(run: Run) -> int:
    """Return a batch size near the run's that the devices here divide."""
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    return -(-run.config.data.batch_size // ways) * ways
