"""Score a run that is on disk."""

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm

from aether.data.corpus import Corpus, load_validation, masked_view, open_corpus
from aether.data.examples import Examples
from aether.data.images.load import load_validation as load_images
from aether.data.loader import evaluation_batches
from aether.errors import InputError, StorageError
from aether.evaluate.images import Mistakes, image_sums, summarise_images
from aether.evaluate.load import Run, load_run
from aether.evaluate.metrics import scorer_of, summer
from aether.evaluate.pictures import draw_confusion, draw_mistakes
from aether.workdir import Workdir


def evaluate_run(
    workdir: str,
    *,
    step: int | None = None,
    data: str | None = None,
    batches: int = 0,
    pictures: str | None = None,
    average: str = "auto",
) -> dict[str, Any]:
    """Score a checkpoint (the last by default); return step, average, data and the scores of `scorer_of`.

    Of a classifier also draw which classes it confuses and what it takes for something else most confidently;
    "pictures" says where.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      data: a path as in `data.path`, or the name of one of the run's validation sets; by default the first of them.
      batches: how many, spread evenly over the set; 0 for all of it.
      pictures: folder of a classifier's pictures; by default evaluation/NAME-STEP in the run's, or none, with a
        warning, where that cannot be written.
      average: see `load_run`.

    Raises:
      InputError: no such run, checkpoint or data, or pictures are asked of a language model.
      StorageError: `pictures` cannot be written.
    """
    run = load_run(workdir, step, average=average)
    if pictures and run.labels is None:
        raise InputError(f"--pictures is {pictures!r}, but {run.config.model.kind} reads text; leave it out.")
    name, examples = validation_examples(run, data)
    config = dataclasses.replace(run.config.data, batch_size=rows_of(run, run.config.data.batch_size))
    total = -(-len(examples) // config.batch_size)
    shown = tqdm(
        evaluation_batches(examples, config, batches),
        total=min(batches or total, total),
        desc=name,
        unit="batch",
        file=sys.stderr,
        disable=not sys.stderr.isatty() or jax.process_index() > 0,
    )
    known = {"step": run.step, "average": run.average, "data": name}
    if run.labels is None:
        return known | scorer_of(run.config, run.tokenizer, run.graph, run.mesh)(run.params, shown)
    return known | _classify(run, name, shown, pictures)


def _classify(run: Run, name: str, batches: Iterable[dict[str, Any]], folder: str | None) -> dict[str, Any]:
    """Score a classifier and draw its pictures; the scores are worth more than pictures that nobody asked for."""
    assert run.labels is not None
    home = Workdir(folder or run.workdir, primary=False)
    if folder:
        home.check_writable()
    mistakes = Mistakes()
    sums = summer(run.graph, image_sums(run.config, rows=True), run.mesh, mistakes)(run.params, batches)
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    place = "" if folder else f"evaluation/{stem}-{run.step}/"
    names, images = run.labels.names, round(sums["weight"])
    drawn = {"confusion.png": draw_confusion(sums["confusion"], names, images)}
    drawn["mistakes.png"] = draw_mistakes(mistakes.worst, names, images)
    try:
        left = [home.leave(place + file, content) for file, content in drawn.items()]
    except (OSError, StorageError) as e:
        if folder:
            raise
        print(f"warning: no pictures, name a folder by --pictures: {e}", file=sys.stderr)
        left = []
    return summarise_images(sums) | {"pictures": left}


def validation_examples(run: Run, data: str | None = None) -> tuple[str, Examples]:
    """Return the name and the examples of the data that `evaluate_run` would score."""
    c = run.config.data
    named = c.validation or ({} if c.mixture or not c.validation_fraction else {"validation": ""})
    if data and data not in named:
        return data, other_examples(run, data, key="--data")
    if c.validation:
        name = data or next(iter(c.validation))
        return name, other_examples(run, c.validation[name], key=f"data.validation.{name}")
    corpus = own_corpus(run)
    if not corpus.validation:
        raise InputError(f"The run in {run.workdir} has no validation data; give some by --data.")
    name = data or next(iter(corpus.validation))
    return name, corpus.validation[name]


def other_examples(run: Run, path: str, key: str) -> Examples:
    """Open data that are not the run's own; `key` is what a person set to the path."""
    if run.labels is not None:
        return load_images(path, run.config.data, run.config.image, run.labels, key=key)
    assert run.tokenizer is not None
    windows = load_validation(path, run.config.data, run.tokenizer, key=key)
    return masked_view(windows, run.config.data.mask_rate, run.tokenizer) if run.config.model.task == "mlm" else windows


def own_corpus(run: Run) -> Corpus:
    """Open the run's own data.

    Raises:
      InputError: they are not there, or not those that it began with.
    """
    corpus = open_corpus(run.config)
    began = Workdir(run.workdir, primary=False).read_json("config.json")["data_fingerprint"]
    if corpus.fingerprint != began:
        raise InputError(
            f"The data of data.path have changed since the run in {run.workdir} began (fingerprint {began[:8]} then, "
            f"{corpus.fingerprint[:8]} now); restore them, or name others by --data."
        )
    return corpus


def rows_of(run: Run, size: int) -> int:
    """Return a batch size near this one that the devices here divide."""
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    return -(-size // ways) * ways
