"""Inputs of a run's network: some of a data set, or of data that are not its own, in the form that it takes."""

import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from aether.data.examples import Examples
from aether.data.images.load import Labels, image_set
from aether.data.images.sources import open_source
from aether.errors import InputError
from aether.evaluate.load import Run
from aether.evaluate.run import validation_examples
from aether.losses import scaled


def spread(total: int, count: int) -> list[int]:
    """Return `count` numbers below `total`, evenly spaced, or all."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def chosen(run: Run, examples: Examples, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return that many examples evenly spread, images uint8 with labels, or whole windows of ids and None.

    Raises:
      InputError: a text is shorter than a window.
    """
    found = [examples[i] for i in spread(len(examples), count)]
    if run.labels is not None:
        return np.stack([e["images"] for e in found]), np.array([e["labels"] for e in found])
    whole = [e["tokens"][: run.config.data.context] for e in found if e["segments"].all()]  # without padding
    if not whole:
        raise InputError(f"{run.workdir} reads {run.config.data.context} ids and a text has fewer; give a longer one.")
    return np.stack(whole), None


def foreign(run: Run, path: str, count: int, key: str) -> np.ndarray:
    """Return examples of other data in the form of the run's: pictures whole, resized, whatever their classes.

    Args:
      run: whose network is to take them.
      path: as in `data.path`.
      count: how many, evenly spread.
      key: what a person set to the path, for messages.

    Raises:
      InputError: there are no such data, or they do not fit.
    """
    if run.labels is None:
        return chosen(run, validation_examples(run, path)[1], count)[0]
    image = replace(run.config.image, eval_crop=1.0)
    source = open_source(path, run.config.data, image.strict, lambda line: print(line, file=sys.stderr), key)
    labels = Labels(source.classes, run.labels.pictures)
    return chosen(run, image_set(source, source.held_out or source.train, labels, image), count)[0]


def as_taken(run: Run, x: np.ndarray) -> np.ndarray:
    """Return images as the network takes them, float32; ids stay."""
    c = run.config.image
    return x if run.labels is None else np.asarray(scaled(jnp.asarray(x), c.mean, c.std))
