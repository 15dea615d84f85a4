"""Batches of examples: every batch is a function of (seed, step) alone, on any number of hosts and workers."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from aether.config import DataConfig
from aether.data.encode import end_with_parent
from aether.data.examples import Batch, Example, Examples
from aether.errors import InputError

ENDLESS = 1 << 50


@dataclass(frozen=True)
class TrainSet:
    """A named training set with its share of the batches."""

    name: str
    weight: float
    examples: Examples


@dataclass(frozen=True)
class _Numbers:
    """A source of (set, example) pairs, which are shuffled and mixed in place of the examples themselves."""

    source: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, index


def _order(train: list[TrainSet], seed: int) -> grain.MapDataset:
    """Return the endless sequence of (set, example): each set shuffled anew every epoch, mixed by weight."""
    sets = []
    for number, part in enumerate(train):
        # Grain shuffles epoch e with seed + e: hashing keeps neighbouring seeds from sharing epochs.
        own = int.from_bytes(hashlib.sha256(f"{seed} {part.name}".encode()).digest()[:4], "little")
        sets.append(grain.MapDataset.source(_Numbers(number, len(part.examples))).shuffle(seed=own).repeat())
    return sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, [part.weight for part in train])


class _TrainBatches:
    """Random access to training batches from a step on."""

    def __init__(self, train: list[TrainSet], batch_size: int, seed: int, step: int, rows: Sequence[int]):
        self.train, self.batch_size, self.step, self.rows = train, batch_size, step, rows
        self.order, self.seed = _order(train, seed), seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        first = (self.step + index) * self.batch_size
        picked = [(first + row, *self.order[first + row]) for row in self.rows]
        for number, part in enumerate(self.train):
            part.examples.fetch(index for _, source, index in picked if source == number)
        return _stack([self.train[source].examples.draw(index, (self.seed, place)) for place, source, index in picked])


def _stack(examples: list[Example]) -> Batch:
    # sorted, as Grain's processes hand dicts on
    return {key: np.stack([example[key] for example in examples]) for key in sorted(examples[0])}


class _EvaluationBatches:
    """Random access to the chosen batches of a set, rows beyond its last example blank."""

    def __init__(self, examples: Examples, batch_size: int, chosen: Sequence[int], rows: Sequence[int]):
        self.examples, self.batch_size, self.chosen, self.rows = examples, batch_size, chosen, rows

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Batch:
        examples = self.examples
        wanted = [self.chosen[index] * self.batch_size + row for row in self.rows]
        examples.fetch(index for index in wanted if index < len(examples))
        return _stack([examples[index] if index < len(examples) else examples.blank() for index in wanted])


def _read_ahead(
    batches: _TrainBatches | _EvaluationBatches, prefetch: int, threads: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Read batches in order ahead of their use, from now on, in threads or in worker processes."""
    options = grain.ReadOptions(num_threads=0 if workers else threads, prefetch_buffer_size=0 if workers else prefetch)
    ahead = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        # A pipe, since shared memory outlives a job that is killed as a whole, and containers often have 64 MB of it.
        # Of pictures of 224 x 224 a pipe passes about 2,000 a second, and this process takes 7,000 from all of them.
        pipe = grain.experimental.DatasetOptions(min_shm_size=1 << 40)
        each = max(1, prefetch // (2 * workers))  # Grain keeps as many in a worker and once more on this side
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=each)
        ahead = grain.experimental.WithOptionsIterDataset(ahead, pipe).mp_prefetch(processes, _start_worker)
    iterator = iter(ahead)
    if not workers:
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
    train: list[TrainSet], config: DataConfig, seed: int, step: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield the batches of updates step+1, step+2, ... without end, or `rows` of them: those of this process."""
    rows = range(config.batch_size) if rows is None else rows
    batches = _TrainBatches(train, config.batch_size, seed, step, rows)
    return _read_ahead(batches, config.prefetch, workers=config.workers)


def batch_ids(train: list[TrainSet], config: DataConfig, seed: int, step: int) -> list[str]:
    """Name the examples of the batch that `train_batches` yields first from `step`, over all processes."""
    order = _order(train, seed)
    picked = (order[step * config.batch_size + row] for row in range(config.batch_size))
    return [f"{train[source].name}:{index}" for source, index in picked]


def evaluation_batches(
    examples: Examples, config: DataConfig, batches: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield all examples once in order, or `batches` batches spread evenly; or `rows` of each of them.

    Rows beyond the last example are blank, their mask 0. Batches are read in `data.workers` threads: processes would
    have to start anew for every evaluation, and PIL lets threads run while it decodes.
    """
    rows = range(config.batch_size) if rows is None else rows
    total = -(-len(examples) // config.batch_size)
    chosen = range(total) if not 0 < batches < total else [(2 * k + 1) * total // (2 * batches) for k in range(batches)]
    wanted = _EvaluationBatches(examples, config.batch_size, chosen, rows)
    return _read_ahead(wanted, config.prefetch, threads=max(1, config.workers))
