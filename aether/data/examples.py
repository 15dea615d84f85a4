"""What batches are made of."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

Example = dict[str, Any]  # arrays and numbers by name, of the same shapes for all examples of a set
Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """What batches are made of, by number: windows of a text (`aether.data.pack`), images (`aether.data.images`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Return an example as evaluation sees it."""

    def draw(self, index: int, seed: Sequence[int]) -> Example:
        """Return an example as training sees it, a function of its number and the seed."""

    def blank(self) -> Example:
        """Return what pads a batch: an example of which nothing is scored."""

    def fetch(self, indices: Iterable[int]) -> None:
        """Fetch what these examples lack of remote files, side by side."""
