"""Corpora and batches: every batch is a function of (seed, step) alone, on any number of hosts and workers."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import grain
import numpy as np

from aether.config import DataConfig
from aether.data.cache import characters_of, find, prepare_cached
from aether.data.encode import end_with_parent
from aether.data.pack import Window, Windows
from aether.data.prepared import Prepared, check_tokenizer
from aether.data.sources import Source
from aether.data.tokenizers import Tokenizer, chars_tokenizer, load_tokenizer
from aether.errors import InputError

ENDLESS = 1 << 50
Batch = dict[str, np.ndarray]
Log = Callable[[str], None]


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class TrainSet:
    """A named training text with its share of the batches."""

    name: str
    weight: float
    windows: Windows


@dataclass(frozen=True)
class Corpus:
    """All texts of a run.

    Attributes:
      fingerprint: changes when a training text, its split, or the tokenizer changes.
      summary: lines a person wants to see at start-up.
    """

    tokenizer: Tokenizer
    fingerprint: str
    train: list[TrainSet]
    validation: dict[str, Windows]
    summary: list[str]


def load_corpus(config: DataConfig, log: Log = _silent) -> Corpus:
    """Find, prepare (or take from the cache) and open the texts of a run.

    Raises:
      InputError: a text that is missing, empty, too short, or made with another tokenizer.
    """
    paths = config.mixture or {"train": config.path}
    found = {name: find(path, config) for name, path in paths.items()}
    tokenizer = _tokenizer(found, config)
    if config.validation:
        config = replace(config, validation_fraction=0.0)
    train, validation, summary, prints = (
        [],
        {},
        [f"tokenizer {tokenizer.spec}: {tokenizer.vocab_size} ids"],
        [tokenizer.hash],
    )
    for name, place in found.items():
        prepared = _prepared(place, config, tokenizer, log)
        train.append(
            TrainSet(name, config.weights.get(name, 1.0), _windows(prepared, "train", config, tokenizer, padded=False))
        )
        prints.append(f"{name} {prepared.fingerprint}")
        summary += _describe(name, prepared, "train")
        if not config.validation and "validation" in prepared.splits:
            held = f"validation_{name}" if config.mixture else "validation"
            validation[held] = _windows(prepared, "validation", config, tokenizer, padded=True)
            summary += _describe(held, prepared, "validation")
    for name, path in config.validation.items():
        validation[name] = load_validation(path, config, tokenizer, log)
        summary.append(f"{name}: {validation[name].tokens:,} tokens from {path}")
    for line in summary:
        log(line)
    return Corpus(tokenizer, hashlib.sha256("\n".join(prints).encode()).hexdigest()[:32], train, validation, summary)


def load_validation(path: str, config: DataConfig, tokenizer: Tokenizer, log: Log = _silent) -> Windows:
    """Open the whole text behind a path for evaluation.

    Of a prepared folder or a TFDS set that has a held-out split, that split is taken.
    """
    place = find(path, config)
    if isinstance(place, Source) and place.held_out:
        place = Source(place.path, place.held_out, place.single)
    prepared = _prepared(place, replace(config, validation_fraction=0.0), tokenizer, log)
    split = "validation" if "validation" in prepared.splits else "train"
    return _windows(prepared, split, config, tokenizer, padded=True)


def _tokenizer(found: dict[str, Source | Prepared], config: DataConfig) -> Tokenizer:
    if config.tokenizer != "chars":
        return load_tokenizer(config.tokenizer)
    for place in found.values():
        if isinstance(place, Prepared):
            tokenizer = place.tokenizer()
            if tokenizer.kind != "chars":
                raise InputError(
                    f"{place.folder} was prepared with the tokenizer {tokenizer.spec} and data.tokenizer is chars; "
                    f"set data.tokenizer={tokenizer.spec}, or prepare the text again."
                )
            return tokenizer
    return chars_tokenizer("".join(characters_of(s, config) for s in found.values() if isinstance(s, Source)))


def _prepared(place: Source | Prepared, config: DataConfig, tokenizer: Tokenizer, log: Log) -> Prepared:
    if isinstance(place, Source):
        return prepare_cached(place, config, tokenizer, log)
    check_tokenizer(place, tokenizer)
    return place


def _windows(prepared: Prepared, split: str, config: DataConfig, tokenizer: Tokenizer, padded: bool) -> Windows:
    return Windows(prepared, split, config.context, config.segments, tokenizer.eot, padded, tokenizer.vocab_size)


def _describe(name: str, prepared: Prepared, split: str) -> list[str]:
    part = prepared.splits[split]
    begin, end = part["tokens"]
    lines = [f"{name}: {end - begin:,} tokens in {part['documents']:,} documents from {prepared.manifest['source']}"]
    skipped = prepared.manifest["skipped"]
    if skipped and split == "train":
        names = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        lines.append(f"{name}: skipped {len(skipped)} files that are not UTF-8 text: {names}")
    return lines


@dataclass(frozen=True)
class _Numbers:
    """A source of (set, window) pairs, which are shuffled and mixed in place of the windows themselves."""

    source: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, index


def _order(train: list[TrainSet], seed: int) -> grain.MapDataset:
    """Return the endless sequence of (set, window): each set shuffled anew every epoch, mixed by weight."""
    sets = []
    for number, part in enumerate(train):
        # Grain shuffles epoch e with seed + e: hashing keeps neighbouring seeds from sharing epochs.
        own = int.from_bytes(hashlib.sha256(f"{seed} {part.name}".encode()).digest()[:4], "little")
        sets.append(grain.MapDataset.source(_Numbers(number, len(part.windows))).shuffle(seed=own).repeat())
    return sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, [part.weight for part in train])


class _TrainBatches:
    """Random access to training batches from a step on."""

    def __init__(self, train: list[TrainSet], batch_size: int, seed: int, step: int, rows: Sequence[int]):
        self.train, self.batch_size, self.step, self.rows = train, batch_size, step, rows
        self.order = _order(train, seed)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        first = (self.step + index) * self.batch_size
        picked = [self.order[first + row] for row in self.rows]
        for number, part in enumerate(self.train):
            part.windows.fetch(window for source, window in picked if source == number)
        return _stack([self.train[source].windows[window] for source, window in picked])


def _stack(windows: list[Window]) -> Batch:
    # sorted, as Grain's processes hand dicts on
    return {key: np.stack([w[key] for w in windows]) for key in sorted(windows[0])}


def _read_ahead(batches: _TrainBatches, config: DataConfig) -> Iterator[Batch]:
    """Read batches in order ahead of their use, from now on, in a thread or in worker processes."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
    ahead = grain.MapDataset.source(batches).to_iter_dataset(options)
    if config.workers:
        # A pipe is quick enough for token ids, and shared memory would outlive a killed run.
        pipe = grain.experimental.DatasetOptions(min_shm_size=1 << 40)
        each = max(1, config.prefetch // config.workers)
        processes = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=each)
        ahead = grain.experimental.WithOptionsIterDataset(ahead, pipe).mp_prefetch(processes, _start_worker)
    iterator = iter(ahead)
    if not config.workers:
        iterator.start_prefetch()
    return _drain(iterator)


def _start_worker(index: int, count: int) -> None:
    end_with_parent()


def _drain(iterator: grain.DatasetIterator) -> Iterator[Batch]:
    """Pass batches on; closing this ends the threads or processes behind it."""
    try:
        yield from iterator
    except Exception as e:
        if type(e).__name__ == "UnparsedFlagAccessError":
            raise InputError(
                "data.workers above 0 starts Grain's processes, which read absl's flags: "
                "call absl.flags.FLAGS.mark_as_parsed() before, or set data.workers=0."
            ) from e
        raise
    finally:
        iterator.close()


def train_batches(
    corpus: Corpus, config: DataConfig, seed: int, step: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield the batches of updates step+1, step+2, ... without end, or `rows` of them: those of this process.

    See `Windows` for the arrays.
    """
    rows = range(config.batch_size) if rows is None else rows
    return _read_ahead(_TrainBatches(corpus.train, config.batch_size, seed, step, rows), config)


def batch_ids(corpus: Corpus, config: DataConfig, seed: int, step: int) -> list[str]:
    """Name the sequences of the batch that `train_batches` yields first from `step`, over all processes."""
    order = _order(corpus.train, seed)
    picked = (order[step * config.batch_size + row] for row in range(config.batch_size))
    return [f"{corpus.train[source].name}:{window}" for source, window in picked]


def validation_batches(
    corpus: Corpus, config: DataConfig, name: str, batches: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield a validation set once; see `window_batches`."""
    return window_batches(corpus.validation[name], config, batches, rows)


def window_batches(
    windows: Windows, config: DataConfig, batches: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield all windows once in order, or `batches` batches spread evenly; or `rows` of each of them.

    Rows beyond the last window have mask 0.
    """
    rows = range(config.batch_size) if rows is None else rows
    total = -(-len(windows) // config.batch_size)
    chosen = range(total) if not 0 < batches < total else [(2 * k + 1) * total // (2 * batches) for k in range(batches)]
    for batch in chosen:
        wanted = [batch * config.batch_size + row for row in rows]
        windows.fetch(index for index in wanted if index < len(windows))
        yield _stack([_window_or_blank(windows, index) for index in wanted])


def _window_or_blank(windows: Windows, index: int) -> Window:
    if index < len(windows):
        return windows[index]
    size = windows.context + 1
    blank = {key: np.zeros(size, np.int32) for key in ("segments", "positions")}
    return dict(tokens=np.full(size, windows.eot, np.int32), **blank, mask=np.zeros(size - 1, np.int32))
