"""The tokens of a remote shard: blocks are fetched when they are first read, and stay on this machine's disk."""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aether import remote
from aether.errors import StorageError

BLOCK = 1 << 18  # bytes a request: its answer comes within two round trips, and costs about as much as a window's
SUMS = ".blocks"
TOGETHER = 16  # requests under way


class Blocks:
    """A remote .npy file as a sparse local copy, shared by all processes of a machine without a lock.

    Beside the copy lies one uint32 a block: 0 until the block is there, then its CRC-32 (1 in place of 0). Two
    processes that fetch the same block write the same bytes, and after a crash a block that does not fit its sum is
    fetched again. Nothing is written through a memory map, which would end a process on a full disk.

    Args:
      address: the remote file, of `size` bytes, of which the last `count` items of `dtype` are the array.
      copy: the local file.
    """

    def __init__(self, address: str, copy: str, size: int, count: int, dtype: np.dtype):
        self.address, self.copy, self.size = address, copy, size
        self._fs, self._path = remote.connect(address)
        self._first = size - count * dtype.itemsize
        blocks = -(-size // BLOCK)
        try:
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            self._bytes, self._have = _map(copy, size, np.uint8), _map(copy + SUMS, blocks, np.uint32)
        except OSError as e:
            raise self._cannot_write(e) from e
        self._array = self._bytes[self._first :].view(dtype)
        self._checked = np.zeros(blocks, bool)

    def __getitem__(self, part: slice) -> np.ndarray:
        for block in self.missing(part.start, part.stop):
            self.fetch(block)
        return self._array[part]

    def missing(self, begin: int, end: int) -> list[int]:
        """Return the blocks behind the items [begin, end) that have to be fetched."""
        item = self._array.itemsize
        first, last = (self._first + begin * item) // BLOCK, (self._first + end * item - 1) // BLOCK
        return [block for block in range(first, last + 1) if not self._is_whole(block)]

    def _is_whole(self, block: int) -> bool:
        """Return whether a block is there; its sum is compared once in each process."""
        if not self._checked[block] and self._have[block]:
            content = self._bytes[block * BLOCK : (block + 1) * BLOCK]
            self._checked[block] = _sum(content.data) == self._have[block]
        return bool(self._checked[block])

    def fetch(self, block: int) -> None:
        """Fetch a block and keep it.

        Raises:
          StorageError: the remote cannot be reached, or the disk is full.
        """
        begin = block * BLOCK
        content = remote.read_range(self._fs, self._path, self.address, begin, min(begin + BLOCK, self.size))
        try:
            _write(self.copy, content, begin)
            _write(self.copy + SUMS, np.uint32(_sum(content)).tobytes(), 4 * block)
        except OSError as e:
            raise self._cannot_write(e) from e
        self._checked[block] = True

    def _cannot_write(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.copy} cannot be written: {error.strerror or error}; free some space, or set data.cache_dir to a "
            "larger disk."
        )


def _map(file: str, count: int, dtype: Any) -> np.ndarray:
    """Map an array of a file, made of zeros if it is new; the file is not kept open, since there may be thousands."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, count * np.dtype(dtype).itemsize)
    finally:
        os.close(handle)
    return np.asarray(np.memmap(file, dtype, "r"))


def _write(file: str, content: bytes, at: int) -> None:
    handle = os.open(file, os.O_WRONLY)
    try:
        while content:
            count = os.pwrite(handle, content, at)
            content, at = content[count:], at + count
    finally:
        os.close(handle)


def _sum(content: bytes | memoryview) -> int:
    return zlib.crc32(content) or 1


def fetch_all(wanted: Iterable[tuple[Blocks, int]]) -> None:
    """Fetch blocks side by side, each once."""
    work = list(dict.fromkeys(wanted))
    if not work:
        return
    with ThreadPoolExecutor(min(len(work), TOGETHER)) as pool:
        try:
            for done in [pool.submit(blocks.fetch, block) for blocks, block in work]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the others are not tried
