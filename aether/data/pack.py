"""Packing as index arithmetic: sequence i of a split is the window of T+1 tokens at i*T over all shards."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from aether import remote
from aether.data.blocks import Blocks, fetch_all
from aether.data.prepared import Prepared, check_ids, shard_file
from aether.errors import InputError

Window = dict[str, np.ndarray]


class Windows:
    """The windows of one split of a prepared folder, by number.

    Each is a dict of int32 arrays, of documents laid end to end, each beginning with end of text:
      tokens (T+1,): inputs are [:-1], targets [1:].
      segments (T+1,): 1, 2, ... for the documents within the window, 0 for padding; all 1 without `segments`.
      positions (T+1,): tokens since the document or the window began, whichever is later.
      mask (T,): 1 where the target is to be scored, 0 for padding.

    Args:
      padded: add a last window with what is left, so that every token but the first is scored exactly once.

    Raises:
      InputError: the split is shorter than one sequence (padded: than two tokens).
    """

    def __init__(
        self, prepared: Prepared, split: str, context: int, segments: bool, eot: int, padded: bool, vocab: int
    ):
        self.prepared, self.split, self.context, self.segments = prepared, split, context, segments
        self.folder, self.eot, self.vocab = prepared.folder, eot, vocab
        self.begin, self.end = prepared.splits[split]["tokens"]
        self.documents = prepared.splits[split]["documents"]
        counts = [shard["tokens"] for shard in prepared.manifest["shards"]]
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._open: dict[int, np.ndarray | Blocks] = {}
        targets = self.tokens - 1
        self.count = -(-targets // context) if padded else targets // context
        if self.count < 1:
            need = 2 if padded else context + 1
            raise InputError(
                f"{prepared.manifest['source']} ({split}) has {self.tokens} tokens, and data.context={context} needs "
                f"at least {need}; use more text or a smaller data.context."
            )

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the split."""
        return self.end - self.begin

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < self.count:
            raise IndexError(index)
        size = self.context + 1
        begin = self.begin + index * self.context
        end = min(begin + size, self.end)
        tokens = np.full(size, self.eot, np.int32)
        self._fill(tokens, begin, end)
        filled = end - begin
        segments, positions = _structure(tokens, filled, self.eot) if self.segments else _plain(size)
        mask = np.ones(self.context, np.int32)
        if filled < size:
            segments[filled:], positions[filled:], mask[filled - 1 :] = 0, 0, 0
        return dict(tokens=tokens, segments=segments, positions=positions, mask=mask)

    def draw(self, index: int, seed: Sequence[int]) -> Window:
        """Return window `index`: nothing about it is random."""
        return self[index]

    def blank(self) -> Window:
        """Return a window that is padding from end to end."""
        size = self.context + 1
        zeros = {key: np.zeros(size, np.int32) for key in ("segments", "positions")}
        return dict(tokens=np.full(size, self.eot, np.int32), **zeros, mask=np.zeros(size - 1, np.int32))

    def fetch(self, indices: Iterable[int]) -> None:
        """Fetch what these windows lack of a remote folder, side by side; of a local one nothing."""
        if remote.is_remote(self.folder):
            wanted = []
            for index in indices:
                begin = self.begin + index * self.context
                for number, first, last in self._pieces(begin, min(begin + self.context + 1, self.end)):
                    shard = self._shard(number)
                    assert isinstance(shard, Blocks)
                    wanted += [(shard, block) for block in shard.missing(first, last)]
            fetch_all(wanted)

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first, last) of the parts of shards that make up the tokens [begin, end)."""
        shard = int(np.searchsorted(self.shard_starts, begin, side="right")) - 1
        while begin < end:
            start, stop = int(self.shard_starts[shard]), min(end, int(self.shard_starts[shard + 1]))
            yield shard, begin - start, stop - start
            begin, shard = stop, shard + 1

    def _fill(self, tokens: np.ndarray, begin: int, end: int) -> None:
        """Copy the tokens in [begin, end)."""
        at = 0
        for shard, first, last in self._pieces(begin, end):
            piece = tokens[at : at + last - first]
            piece[:] = self._shard(shard)[first:last]
            check_ids(int(piece.max()), self.vocab, shard_file(self.folder, "tokens", shard))
            at += last - first

    def _shard(self, number: int) -> np.ndarray | Blocks:
        """Open a shard's tokens at their first use in this process: a memory map, or blocks of a remote file."""
        if number not in self._open:
            file = shard_file(self.folder, "tokens", number)
            if remote.is_remote(file):
                self._open[number] = self._blocks(file, number)
                return self._open[number]
            try:
                self._open[number] = np.asarray(np.load(file, mmap_mode="r"))
            except (OSError, ValueError) as e:
                raise InputError(
                    f"shard {number} of {self.folder} cannot be read ({e}); prepare the text again."
                ) from e
        return self._open[number]

    def _blocks(self, file: str, number: int) -> Blocks:
        name, about = os.path.basename(file), self.prepared.manifest
        copy = os.path.join(self.prepared.cache, name)
        return Blocks(
            file, copy, self.prepared.sizes[name], about["shards"][number]["tokens"], np.dtype(about["dtype"])
        )

    def name(self, index: int) -> str:
        """Return where a window lies, for messages."""
        begin = self.begin + index * self.context
        return (
            f"{os.path.basename(self.folder)}/{self.split} tokens {begin} to {min(begin + self.context, self.end - 1)}"
        )


def _structure(tokens: np.ndarray, filled: int, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the documents, each of which begins with end of text, and the tokens within them."""
    size = len(tokens)
    starts = np.flatnonzero(tokens[1:filled] == eot) + 1
    if not len(starts):
        return _plain(size)
    edges = np.concatenate([[0], starts, [size]])
    lengths = np.diff(edges)
    segments = np.repeat(np.arange(1, len(edges), dtype=np.int32), lengths)
    positions = np.arange(size, dtype=np.int32) - np.repeat(edges[:-1].astype(np.int32), lengths)
    return segments, positions


def _plain(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(size, np.int32), np.arange(size, dtype=np.int32)
