"""What the parts of a report look at: a run's network, some of its validation data, and what was asked for."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx

from aether.data.examples import Batch, Examples
from aether.data.tokenizers import EOT
from aether.errors import InputError
from aether.evaluate.inputs import as_taken, spread
from aether.evaluate.load import Run
from aether.evaluate.run import validation_examples
from aether.explain.layers import layer_of
from aether.explain.points import centres_of
from aether.explain.prototypes import KINDS
from aether.models import describe_model

ROWS = 32  # inputs of a forward pass
PAUSE = 5.0  # seconds between lines of progress
USUAL = 1.6e8  # parameters of AetherGPT 124m, with its untied head


@dataclass(frozen=True)
class Asked:
    """What a person chose.

    Attributes:
      data: what to look at, as in `launch.evaluate --data`; None: the run's first validation set.
      inputs: how many texts or images of it.
      length: tokens of each text.
      texts: to be taken apart instead.
      layers: whose prototypes are shown; some by default.
      units: of these layers; some by default.
      outside: name -> path of data that are not the run's.
      baseline: folder of a run whose first layer is shown beside.
    """

    data: str | None = None
    inputs: int = 100
    length: int = 128
    texts: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    units: tuple[int, ...] = ()
    outside: dict[str, str] = field(default_factory=dict)
    baseline: str = ""


@dataclass(frozen=True)
class Text:
    """A text to be taken apart: the logit of `target` at `position`, what follows or is hidden there."""

    ids: np.ndarray
    target: int
    position: int


@dataclass
class Subject:
    """A run to be explained; `say` takes lines of progress. The network computes in float32, whatever it trained in.

    Raises:
      InputError: a layer or unit that was asked for does not exist, or a text cannot be read.
    """

    run: Run
    asked: Asked
    say: Callable[[str], None]
    model: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = self.run.config
        graph, *_ = describe_model(replace(config, model=replace(config.model, dtype="float32")))
        self.model = nnx.merge(graph, self.run.params)
        if self.asked.units and not self.asked.layers:
            raise InputError(f"--unit is {self.asked.units[0]}, but there is no --layer; say whose unit is meant.")
        for name in self.asked.layers:
            units = len(centres_of(layer_of(self.model, name, KINDS)))
            wrong = [unit for unit in self.asked.units if not 0 <= unit < units]
            if wrong:
                raise InputError(f"--unit is {wrong[0]}, and {name} has {units} units; give one of 0 to {units - 1}.")
        if self.asked.texts and self.images:
            raise InputError(f"--text is given, but {self.run.config.model.kind} reads images; leave it out.")
        if self.asked.texts:
            _ = self.texts  # one that cannot be read is refused now, not after other parts

    @property
    def images(self) -> bool:
        """Whether the network reads images."""
        return self.run.labels is not None

    @cached_property
    def examples(self) -> tuple[str, Examples]:
        """The name and the examples of the data."""
        return validation_examples(self.run, self.asked.data)

    def few(self, tokens: float) -> int:
        """Return how many inputs make so many tokens in a network of 124m: more in a smaller one, 8 at least.

        That is the same work in every network, but for images, which are all taken.
        """
        if self.images:
            return self.asked.inputs
        size = sum(p.size for p in jax.tree.leaves(self.run.params))
        return min(self.asked.inputs, max(8, int(tokens * USUAL / size) // self.length))

    def some(self, count: int) -> np.ndarray:
        """Return so many of the inputs, evenly spaced."""
        return self.x[spread(len(self.x), count)]

    @property
    def length(self) -> int:
        """How many tokens of a text are looked at."""
        return min(self.asked.length, self.run.config.data.context)

    @cached_property
    def x(self) -> np.ndarray:
        """The inputs, spread evenly over the data: ids (n, t), or images (n, s, s, c) as the network takes them."""
        return np.stack([row["x"] for row in self._rows])

    @cached_property
    def labels(self) -> np.ndarray:
        """The classes of the images."""
        return np.array([row["labels"] for row in self._rows])

    @cached_property
    def pictures(self) -> np.ndarray:
        """The images as they are seen, uint8."""
        return np.stack([row["images"] for row in self._rows])

    @cached_property
    def texts(self) -> list[Text]:
        """The texts whose logits are taken apart: those that were asked for, or the data's."""
        if self.asked.texts:
            return [self._encoded(text) for text in self.asked.texts]
        return [Text(row["x"], int(row["target"]), int(row["position"])) for row in self._rows]

    def words(self, ids: Iterable[int]) -> str:
        """Write tokens as a reader sees them."""
        return "".join(piece for piece, _ in self.pieces(ids, itertools.repeat(0.0)))

    def pieces(self, ids: Iterable[int], shares: Iterable[float]) -> list[tuple[str, float]]:
        """Return pieces of text and their shares; tokens that are parts of a character are one piece with their sum."""
        assert self.run.tokenizer is not None
        found, held, sum_ = [], b"", 0.0
        for number, share in zip(ids, shares, strict=False):
            special = {self.run.tokenizer.eot: EOT, self.run.tokenizer.vocab_size: "[hidden]"}.get(int(number))
            if special is None:
                held, sum_ = held + self.run.tokenizer.decode([number]), sum_ + float(share)
            if held and (special is not None or _whole(held)):
                found.append((held.decode(errors="replace"), sum_))
                held, sum_ = b"", 0.0
            if special is not None:
                found.append((special, float(share)))
        return [*found, (held.decode(errors="replace"), sum_)] if held else found

    def batches(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """Yield inputs batch by batch, with progress."""
        return self.progress([x[first : first + ROWS] for first in range(0, len(x), ROWS)], "batches")

    def progress(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """Yield items, and say now and then how many and how long there are to go."""
        began = told = time.monotonic()
        for k, item in enumerate(items):
            yield item
            now = time.monotonic()
            if not k:
                began = now  # programs are compiled for the first one
            elif now - told > PAUSE:
                told = now
                self.say(f"  {k + 1} of {len(items)} {what}, {(now - began) / k * (len(items) - k - 1):.0f} s left")

    @cached_property
    def _rows(self) -> list[Batch]:
        name, examples = self.examples
        if self.images:
            rows = [examples[i] for i in spread(len(examples), self.asked.inputs)]
            return [row | dict(x=as_taken(self.run, row["images"])) for row in rows]
        length = self.length
        masked = self.run.config.model.task == "mlm"
        rows = []
        for i in spread(len(examples), 4 * self.asked.inputs):  # some have a document's end inside
            row = _masked(examples[i], length) if masked else _continued(examples[i], length)
            if row is not None:
                rows.append(row)
        if not rows:
            raise InputError(f"No text of {name} has {length} tokens without a break; set --length lower.")
        return [rows[k] for k in spread(len(rows), self.asked.inputs)]

    def _encoded(self, text: str) -> Text:
        """Return a text whose last token is to be predicted from those before it, or filled in."""
        assert self.run.tokenizer is not None
        ids = np.concatenate([[self.run.tokenizer.eot], self.run.tokenizer.encode(text)]).astype(np.int32)
        follows = self.run.config.model.task == "lm"
        most = self.run.config.data.context - (not follows)
        if not 2 < len(ids) <= most + 1:
            raise InputError(f"--text has {len(ids) - 1} tokens, and takes 2 to {most} (data.context): {text[:40]!r}")
        if follows:
            return Text(ids[:-1], int(ids[-1]), len(ids) - 2)
        hidden = np.append(ids[:-1], np.int32(self.run.tokenizer.vocab_size))
        return Text(hidden, int(ids[-1]), len(hidden) - 1)


def _whole(text: bytes) -> bool:
    """Return whether bytes end where a character does, or are none of UTF-8's."""
    try:
        text.decode()
    except UnicodeDecodeError as e:
        return e.reason != "unexpected end of data"
    return True


def _continued(window: Batch, length: int) -> Batch | None:
    """Return the first tokens of a window and what follows them, unless a document ends there."""
    tokens, segments = window["tokens"], window["segments"]
    if len(tokens) <= length or segments[length] != segments[0] or not segments[0]:
        return None
    return dict(x=tokens[:length], target=tokens[length], position=np.int32(length - 1))


def _masked(window: Batch, length: int) -> Batch | None:
    """Return the first tokens of a masked window and the first hidden one among them, unless a document ends there."""
    segments, chosen = window["segments"][:length], np.flatnonzero(window["mask"][:length])
    if len(segments) < length or segments[-1] != segments[0] or not segments[0] or not len(chosen):
        return None
    place = int(chosen[0])
    return dict(x=window["tokens"][:length], target=window["targets"][place], position=np.int32(place))
