"""Pictures that lie in memory, in files or in records, one like the other: numbered, encoded or not, with a label."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np

from aether.errors import StorageError


class Store(Protocol):
    """Random access to pictures (encoded bytes, or uint8 arrays of height, width, channels) and their labels.

    One travels to worker processes by pickle; files are opened where they are read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]: ...

    def name(self, index: int) -> str:
        """Say which picture this is, the same wherever the data lies."""
        ...

    def labels(self) -> np.ndarray:
        """Return all labels."""
        ...

    def take(self, indices: np.ndarray) -> "Store":
        """Return some of the pictures."""
        ...


@dataclass(frozen=True)
class Source:
    """What a path stands for.

    Attributes:
      shape: height, width and channels of every picture; 0 where they differ.
      held_out: the split for evaluation that comes with the data.
      fingerprint: a digest of all pictures, or of what tells that they changed.
      skipped: files left out, each with the reason.
    """

    path: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Store
    held_out: Store | None
    fingerprint: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrays:
    """Pictures in memory: uint8 (n, height, width, channels) and n labels, from the places `numbers` of a file."""

    images: np.ndarray
    targets: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.targets[index])

    def name(self, index: int) -> str:
        """Return the place in the file."""
        return str(self.numbers[index])

    def labels(self) -> np.ndarray:
        """Return all labels."""
        return self.targets

    def take(self, indices: np.ndarray) -> Self:
        """Return a copy of some of the pictures."""
        return replace(self, images=self.images[indices], targets=self.targets[indices], numbers=self.numbers[indices])

    def digest(self) -> str:
        """Return a digest of the contents."""
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.targets.astype("<i4").data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Files:
    """Encoded pictures, each a file below a folder."""

    root: str
    files: tuple[str, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_file(os.path.join(self.root, self.files[index])), int(self.targets[index])

    def name(self, index: int) -> str:
        """Return the path below the folder."""
        return self.files[index]

    def labels(self) -> np.ndarray:
        """Return all labels."""
        return self.targets

    def take(self, indices: np.ndarray) -> Self:
        """Return some of the pictures."""
        return replace(self, files=tuple(self.files[i] for i in indices), targets=self.targets[indices])


def read_file(path: str) -> bytes:
    """Return the content of a file.

    Raises:
      StorageError: it cannot be read.
    """
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise StorageError(f"{path} cannot be read: {e.strerror}.") from e


@dataclass(frozen=True)
class Records:
    """Encoded pictures with labels in a split of a TFDS set, whose files are in `folder`."""

    path: str
    folder: str
    split: str
    numbers: np.ndarray
    opened: list[Any] = field(default_factory=list, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        record = self._records()[int(self.numbers[index])]
        return record["image"], int(record["label"])

    def name(self, index: int) -> str:
        """Return the split and the number of the record."""
        return f"{self.split}:{self.numbers[index]}"

    def labels(self) -> np.ndarray:
        """Read all labels, which lie beside the pictures: this reads the whole split."""
        from tqdm import tqdm

        records, bar = self._records(), tqdm(self.numbers, delay=1, desc=f"reading the labels of {self.path}")
        return np.array([int(records[int(i)]["label"]) for i in bar], np.int32)

    def take(self, indices: np.ndarray) -> Self:
        """Return some of the pictures."""
        return replace(self, numbers=self.numbers[indices])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.folder, self.split, self.numbers)

    def _records(self) -> Any:
        """Open the records at first use, in each process anew; pictures stay encoded."""
        if not self.opened:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(self.folder)
            decoders = {"image": tfds.decode.SkipDecoding()}
            self.opened.append(builder.as_data_source(self.split, decoders=decoders))
        return self.opened[0]
