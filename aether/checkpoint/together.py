"""What several processes agree on: process 0 decides, and a failure of one is an error of all.

Messages go through JAX's coordination service, not through the devices, so that a thread in the background may send
them in the middle of a training step.
"""

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aether import storage
from aether.errors import AetherError, StorageError, retold

TIMEOUT = 3600  # seconds for what takes longest, another process's part of a save; lost ones are noticed by JAX
SLICE = 2  # seconds between looks at signals


class Together:
    """A series of agreements, each made by all processes in the same order; with one process, nothing is sent."""

    def __init__(self) -> None:
        self._name = ""
        self._counts: dict[str, int] = {}

    @property
    def name(self) -> str:
        """A word that is the same on all processes and no other run's. All ask for it first in their main threads."""
        if not self._name:
            drawn = np.uint32(secrets.randbits(32))
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                drawn = multihost_utils.broadcast_one_to_all(drawn)
            self._name = f"{int(drawn):08x}"
        return self._name

    def agree(self, topic: str, error: Exception | None) -> None:
        """Return once all processes are here without an error; the first one's error is raised on all."""
        verdict = _told(error, "")
        if jax.process_count() > 1:
            verdict = self._collected(self._key(topic), error)
        if verdict:
            raise _error(verdict, error) from error

    def _collected(self, key: str, error: Exception | None) -> list[str]:
        me, first = jax.process_index(), _told(error, "")
        if me:
            self._set(f"{key}/{me}", _told(error, f" (process {me})"))
            return self._get(f"{key}/0", 0)
        for other in range(1, jax.process_count()):
            theirs = self._get(f"{key}/{other}", other)
            first = first or theirs
        self._set(f"{key}/0", first)
        return first

    def ask(self, topic: str, decide: Callable[[], Any]) -> Any:
        """Return what `decide` returns on process 0, something that JSON can hold; what it raises, all raise."""
        if jax.process_count() == 1:
            return decide()
        key = f"{self._key(topic)}/0"
        if jax.process_index():
            told, answer = self._get(key, 0)
            if told:
                raise _error(told, None)
            return answer
        try:
            answer = decide()
        except Exception as e:
            self._set(key, [_told(e, ""), None])
            raise
        self._set(key, [[], answer])
        return answer

    def _key(self, topic: str) -> str:
        self._counts[topic] = self._counts.get(topic, 0) + 1
        return f"aether/{self.name}/{topic}/{self._counts[topic]}"

    def _set(self, key: str, value: Any) -> None:
        _client().key_value_set(key, json.dumps(value))

    def _get(self, key: str, process: int) -> Any:
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                return json.loads(_client().blocking_key_value_get(key, 1000 * SLICE))
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise
            if time.monotonic() > end:
                raise StorageError(f"Process {process} has not finished its part in {TIMEOUT} s; look at its storage.")


def _client() -> Any:
    from jax._src import distributed  # the only way to the service; Orbax and Flax go it too

    return distributed.global_state.client


def _told(error: Exception | None, where: str) -> list[str]:
    """Return what the others are told of an error, nothing if there is none."""
    if error is None:
        return []
    return [type(error).__name__, (str(error) if isinstance(error, AetherError) else storage.one_line(error)) + where]


def _error(told: list[str], own: Exception | None) -> Exception:
    """Return the error that `_told` describes, for any process."""
    kind, text = told
    return retold(kind, text) or own or RuntimeError(text)
