"""The documents of a source in the order in which they are prepared: training text first, held-out text last."""

from collections.abc import Iterator
from dataclasses import dataclass

from aether.config import DataConfig
from aether.data.sources import Source, by_file, read_items
from aether.errors import InputError


@dataclass
class Texts:
    """The documents of a source in the order of the shards: training text first; counts those passed."""

    source: Source
    config: DataConfig
    train: int | None = None
    count: int = 0

    @property
    def fraction(self) -> float:
        """Return the share that is held out."""
        return self.config.validation_fraction

    def __iter__(self) -> Iterator[bytes]:
        if self.fraction and not self.source.held_out and [i.kind for i in self.source.items] == ["text"]:
            yield from self._divided()
            return
        for _, text in read_items(self.source, self.source.items, self.config):
            self.count += 1
            yield text
        if self.source.held_out or by_file(self.source) or not self.fraction:
            self.train = self.count
        for _, text in read_items(self.source, self.source.held_out, self.config):
            self.count += 1
            yield text

    def _divided(self) -> Iterator[bytes]:
        """Yield the first part and the last part of one text, cut by characters (by bytes for bytes)."""
        for _, text in read_items(self.source, self.source.items, self.config):
            whole = text if self.config.tokenizer == "bytes" else text.decode()
            cut = int(len(whole) * (1 - self.fraction))
            parts = [p if isinstance(p, bytes) else p.encode() for p in (whole[:cut], whole[cut:])]
            self.train = int(bool(parts[0]))
            for part in filter(None, parts):
                self.count += 1
                yield part

    def train_documents(self) -> int:
        """Return how many documents are training text, once all have passed."""
        if self.train is not None:
            return self.train
        if self.count < 2:
            raise InputError(
                f"{self.source.path} has one document, so none can be held out; "
                "set data.validation_fraction to 0 or name a text in data.validation."
            )
        return min(max(int(self.count * (1 - self.fraction)), 1), self.count - 1)
