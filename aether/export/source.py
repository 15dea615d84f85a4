"""What targets are written from, and how one is described; JAX-free, as are the processes that only run an export."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from aether.data.images.load import Labels
from aether.data.tokenizers import Tokenizer
from aether.export.parity import Pairs, Verdict, compare_logits

CONFIG, ERROR = "config.json", "error.json"
FORMAT = 1  # of the facts and names of an export
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
Parameters = dict[str, np.ndarray]


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


NOTES = "NOTES.md"  # what a target has to say of the files that it wrote; the card repeats it

Write = Callable[[Source, Path], None]
Finish = Callable[[Path], None]
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
      finish: finish(folder), if any, writes what only a framework can that must not be imported beside Aether; it runs
        in a process of its own, after `write`.
      packages: what must be importable.
      extra: of pyproject.toml, which brings them.
      environment: of those processes.
      channels_first: whether its images are (rows, channels, height, width), and not with the channels last.
      ours: ours(source, batches) yields what `replay` is given and what it should yield, where that is not the inputs
        and Aether's logits.
      compare: compare(folder, pairs of ours and theirs) judges them.
      use: lines of Python that a person may copy, for the model card.
      read: read(folder) returns the parameters by Aether's names, as they were given to `write`, or None where the
        folder is of another target; None for targets that cannot be read back.
    """

    what: str
    write: Write
    replay: Replay
    use: str
    finish: Finish | None = None
    packages: tuple[str, ...] = ()
    extra: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    channels_first: bool = False
    read: Callable[[Path], Parameters | None] | None = None
    ours: Ours | None = None
    compare: Callable[[Path, Pairs], Verdict] = compare_logits


@dataclass(frozen=True)
class Asked:
    """What `aether.export.run.export_run` was asked for, as its parts read it."""

    workdir: str
    step: int | None
    average: str
    dtype: str
    data: str | None
    licence: str
    out: str

    def save(self, work: Path) -> None:
        """Write asked.json."""
        (work / "asked.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, work: Path) -> "Asked":
        """Read it."""
        return cls(**json.loads((work / "asked.json").read_text(encoding="utf-8")))


def save_batches(work: Path, pairs: Pairs) -> None:
    """Write what a comparison is made on, and what Aether makes of it."""
    for k, (inputs, outputs) in enumerate(pairs):
        np.save(work / f"inputs-{k:03}.npy", inputs)
        np.save(work / f"ours-{k:03}.npy", outputs)
        del outputs  # before the next are made


def load_inputs(work: Path) -> Iterator[np.ndarray]:
    """Yield the inputs of `save_batches`."""
    return (np.load(file, allow_pickle=False) for file in sorted(work.glob("inputs-*.npy")))


def save_logits(work: Path, logits: Iterable[np.ndarray]) -> None:
    """Write what an export makes of the inputs."""
    for file, found in zip(sorted(work.glob("inputs-*.npy")), logits, strict=True):
        np.save(file.with_name(file.name.replace("inputs", "theirs")), np.asarray(found))
        del found


def load_pairs(work: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield Aether's outputs and those of the export."""
    for file in sorted(work.glob("ours-*.npy")):
        yield tuple(
            np.load(work / file.name.replace("ours", whose), allow_pickle=False) for whose in ("ours", "theirs")
        )
