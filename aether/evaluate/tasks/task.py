"""What a task is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aether.config import DataConfig
from aether.evaluate.likelihood import Score
from aether.evaluate.requests import Request

Scores = Sequence[Score]


@dataclass(frozen=True)
class Options:
    """What tasks need to know besides their file: the run's `data`, and `stride` as it was given."""

    data: DataConfig
    stride: int | None

    @property
    def context(self) -> int:
        """Return how many ids the model reads."""
        return self.data.context


@dataclass(frozen=True)
class Task:
    """Requests, and what is reported of their scores.

    Attributes:
      requests: all that is to be scored.
      counts: of what, by name: examples, documents, tokens.
      summarise: scores in the order of the requests -> metrics by name, each an `Estimate`.
    """

    requests: list[Request]
    counts: dict[str, int]
    summarise: Callable[[Scores], dict[str, Any]]
