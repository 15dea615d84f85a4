"""Packing as index arithmetic: sequence i of a split is the window of T+1 tokens at i*T over all shards."""

import os
from typing import Any

import numpy as np

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
        self.folder, self.split, self.context, self.segments = prepared.folder, split, context, segments
        self.eot, self.vocab = eot, vocab
        self.begin, self.end = prepared.splits[split]["tokens"]
        self.documents = prepared.splits[split]["documents"]
        counts = [shard["tokens"] for shard in prepared.manifest["shards"]]
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
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
        breaks = self._fill(tokens, begin, end)
        filled = end - begin
        segments, positions = self._structure(size, breaks) if self.segments else _plain(size)
        mask = np.ones(self.context, np.int32)
        if filled < size:
            segments[filled:], positions[filled:], mask[filled - 1 :] = 0, 0, 0
        return dict(tokens=tokens, segments=segments, positions=positions, mask=mask)

    def _fill(self, tokens: np.ndarray, begin: int, end: int) -> list[int]:
        """Copy the tokens in [begin, end) and return where documents begin, both relative to `begin`."""
        breaks: list[int] = []
        shard = int(np.searchsorted(self.shard_starts, begin, side="right")) - 1
        at = begin
        while at < end:
            start = int(self.shard_starts[shard])
            stop = min(end, int(self.shard_starts[shard + 1]))
            ids, documents = self._shard(shard)
            piece = tokens[at - begin : stop - begin]
            piece[:] = ids[at - start : stop - start]
            check_ids(int(piece.max()), self.vocab, shard_file(self.folder, "tokens", shard))
            first, last = np.searchsorted(documents, (at - start, stop - start))
            breaks += (documents[first:last] + (start - begin)).tolist()
            at, shard = stop, shard + 1
        return breaks

    def _structure(self, size: int, breaks: list[int]) -> tuple[np.ndarray, np.ndarray]:
        starts = [b for b in breaks if b]
        if not starts:
            return _plain(size)
        edges = np.array([0, *starts, size])
        lengths = np.diff(edges)
        segments = np.repeat(np.arange(1, len(edges), dtype=np.int32), lengths)
        positions = np.arange(size, dtype=np.int32) - np.repeat(edges[:-1].astype(np.int32), lengths)
        return segments, positions

    def _shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Map a shard's arrays into memory at its first use in this process."""
        if number not in self._open:
            files = (shard_file(self.folder, what, number) for what in ("tokens", "documents"))
            try:
                tokens, documents = (np.asarray(np.load(file, mmap_mode="r")) for file in files)
            except (OSError, ValueError) as e:
                raise InputError(
                    f"shard {number} of {self.folder} cannot be read ({e}); prepare the text again."
                ) from e
            self._open[number] = tokens, documents
        return self._open[number]

    def name(self, index: int) -> str:
        """Return where a window lies, for messages."""
        begin = self.begin + index * self.context
        return (
            f"{os.path.basename(self.folder)}/{self.split} tokens {begin} to {min(begin + self.context, self.end - 1)}"
        )


def _plain(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(size, np.int32), np.arange(size, dtype=np.int32)
