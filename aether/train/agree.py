"""What all processes of a run must know alike: decided by process 0 and told, or compared.

Each function is called by all processes at the same point. A clock, a signal and a file system that lags differ from
machine to machine, and a process that decides by them alone leaves the others waiting in a collective operation.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aether.errors import AetherError, InputError, retold

SMALLEST = 1 << 12  # bytes of a message; longer ones are padded to a power of two, so that few shapes are compiled


def of_first(read: Callable[[], Any]) -> Any:
    """Call `read` on process 0 and return its result, which JSON can hold, on all of them.

    Raises:
      AetherError: what `read` raised on process 0, on all of them.
    """
    if jax.process_count() == 1:
        return read()
    told: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            told = {"value": read()}
        except AetherError as e:
            told = {"error": type(e).__name__, "text": str(e)}
    told = json.loads(_broadcast(json.dumps(told).encode()))
    if "error" in told:
        raise retold(told["error"], told["text"]) or AetherError(told["text"])
    return told["value"]


def check_equal(what: str, text: str, cure: str) -> None:
    """Raise `InputError` on all processes unless they give the same text.

    Args:
      what: differs, for the message.
      text: of at most 64 bytes.
      cure: what to change.
    """
    if jax.process_count() == 1:
        return
    padded = np.frombuffer(text.encode().ljust(64, b"\0"), np.uint8)
    texts = [bytes(row).rstrip(b"\0").decode() for row in _gather(padded)]
    for process, other in enumerate(texts):
        if other != texts[0]:
            raise InputError(f"{what} is {other} on process {process} and {texts[0]} on process 0; {cure}.")


def largest(number: int) -> int:
    """Return the largest of the processes' numbers."""
    return number if jax.process_count() == 1 else int(_gather(np.int32(number)).max())


def _gather(value: Any) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))


def _broadcast(message: bytes) -> bytes:
    """Return process 0's message."""
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    room = max(SMALLEST, 1 << (size - 1).bit_length())
    mine = message if jax.process_index() == 0 else b""
    padded = np.frombuffer(mine.ljust(room, b"\0")[:room], np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)[:size])
