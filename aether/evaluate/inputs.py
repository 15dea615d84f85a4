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
from aether.evaluate.run import other_examples
from aether.losses import scaled


def spread(total: int, count: int) -> list[int]:
    """Return `count` numbers below `total`, evenly spaced, or all."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def chosen(
    run: Run, examples: Examples, count: int, what: str, length: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return that many examples evenly spread, images uint8 with labels, or the first `length` ids of windows and None.

    Args:
      run: whose network takes them.
      examples: of its kind.
      count: how many.
      what: the data, for messages.
      length: of texts; the run's context by default.

    Raises:
      InputError: a text is shorter.
    """
    found = [examples[i] for i in spread(len(examples), count)]
    if run.labels is not None:
        return np.stack([e["images"] for e in found]), np.array([e["labels"] for e in found])
    length = length or run.config.data.context
    whole = [e["tokens"][:length] for e in found if e["segments"][:length].all()]  # without padding
    if not whole:
        raise InputError(f"{what} has fewer tokens than the {length} of an input; give a longer text.")
    return np.stack(whole), None


def foreign(run: Run, path: str, count: int, key: str, length: int = 0) -> np.ndarray:
    """Return examples of other data in the form of the run's: pictures whole, resized, whatever their classes.

    Args:
      run: whose network is to take them.
      path: as in `data.path`.
      count: how many, evenly spread.
      key: what a person set to the path, for messages.
      length: of texts, see `chosen`.

    Raises:
      InputError: there are no such data, or they do not fit.
    """
    if run.labels is None:
        return chosen(run, other_examples(run, path, key), count, f"{key} {path}", length)[0]
    image = replace(run.config.image, eval_crop=1.0)
    source = open_source(path, run.config.data, image.strict, lambda line: print(line, file=sys.stderr), key)
    labels = Labels(source.classes, run.labels.pictures)
    return chosen(run, image_set(source, source.held_out or source.train, labels, image), count, path)[0]


def as_taken(run: Run, x: np.ndarray) -> np.ndarray:
    """Return images as the network takes them, float32; ids stay."""
    c = run.config.image
    return x if run.labels is None else np.asarray(scaled(jnp.asarray(x), c.mean, c.std))
