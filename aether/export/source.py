"""What targets are written from, and how one is described."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aether.data.images.load import Labels
from aether.data.tokenizers import Tokenizer
from aether.export.bundle import Parameters
from aether.export.parity import Pairs, Verdict, compare_logits


@dataclass(frozen=True)
class Source:
    """A network to be exported.

    Attributes:
      facts: of `aether.export.bundle.facts_of`.
      parameters: of `parameters_of`, all of one dtype.
      dtype: its name.
      tokenizer: of texts.
      labels: of images.
      record: the run's config, step and what it was trained on, as config.json of the export tells it.
    """

    facts: dict[str, Any]
    parameters: Parameters = field(repr=False)
    dtype: str
    tokenizer: Tokenizer | None = field(repr=False)
    labels: Labels | None
    record: dict[str, Any] = field(repr=False)


Write = Callable[[Source, Path], None]
Ours = Callable[[Source, list[np.ndarray]], Iterator[tuple[np.ndarray, np.ndarray]]]
Replay = Callable[[Path, Iterable[np.ndarray]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Target:
    """A framework.

    Attributes:
      what: what is written, for people.
      write: write(source, folder) leaves the files, the reference network among them.
      replay: replay(folder, batches) yields the float32 logits of each batch of inputs, computed from the files alone;
        it runs in a process of its own.
      packages: what must be importable.
      extra: of pyproject.toml, which brings them.
      environment: of that process.
      ours: ours(source, batches) yields what `replay` is given and what it should yield, where that is not the inputs
        and Aether's logits.
      compare: compare(folder, pairs of ours and theirs) judges them.
      use: lines of Python that a person may copy, for the model card.
    """

    what: str
    write: Write
    replay: Replay
    use: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    ours: Ours | None = None
    compare: Callable[[Path, Pairs], Verdict] = compare_logits
