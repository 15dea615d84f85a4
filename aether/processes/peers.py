"""Once JAX is up: a process that fails tells the others, so that all end at once, with one message and one exit code.

Otherwise they would sit in a collective operation until JAX notices the silence, and then abort with its stack traces.
"""

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from aether.processes.cluster import Cluster

FAILED = "aether/failed/"  # how the first process that failed did: it is the cause, what comes later may follow from it
GONE = "aether/gone/"
LOOK = 1.0  # seconds between looks
SILENT = 10  # looks in a row without an answer, after which nobody will give one
GRACE = 2.0  # seconds that a process has to end by itself, with its own message
WAIT = 15.0  # seconds at most in which process 0, whose end the others would notice, waits for them


class Peers:
    """The other processes, through JAX's coordination service."""

    def __init__(self, c: Cluster, client: Any):
        self._cluster, self._client = c, client
        self._ending = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self, text: str, code: int) -> None:
        """Tell the others how this process failed, unless one of them did before, and leave with the first's code."""
        self._ending.set()
        mine: dict[str, Any] = dict(index=self._cluster.index, host=socket.gethostname(), text=text, code=code)
        first = self._tell(mine)
        if self._cluster.index == 0 or first is None:
            print(_line(first or mine, mine), file=sys.stderr, flush=True)
        self._leave((first or mine)["code"])

    def _tell(self, mine: dict[str, Any]) -> dict[str, Any] | None:
        """Return who failed first, None if the service does not answer."""
        try:
            self._client.key_value_set(f"{FAILED}first", json.dumps(mine))
        except Exception as e:
            if "ALREADY_EXISTS" not in str(e):
                return None
        return self._first() or mine

    def _first(self) -> dict[str, Any] | None:
        found = dict(self._client.key_value_dir_get(FAILED))
        return json.loads(next(iter(found.values()))) if found else None

    def _watch(self) -> None:
        """Wait until another process fails; end this one if it does not by itself."""
        first, silent = None, 0
        while not first and silent < SILENT:
            if self._ending.wait(LOOK):
                return
            try:
                first, silent = self._first(), 0
            except Exception:
                silent += 1
        if not first:
            return  # the service is shut down, or lost: JAX itself ends the process then
        if self._ending.wait(GRACE):
            return
        if self._cluster.index == 0:
            print(_line(first, None), file=sys.stderr, flush=True)
        self._leave(first["code"])

    def _leave(self, code: int) -> None:
        """End at once: JAX's own way out waits minutes for processes that hang."""
        try:
            self._client.key_value_set(f"{GONE}{self._cluster.index}", "")
            end = time.monotonic() + WAIT
            while self._cluster.index == 0 and time.monotonic() < end:
                if len(self._client.key_value_dir_get(GONE)) >= self._cluster.count:
                    break
                time.sleep(0.1)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)


def _line(first: dict[str, Any], mine: dict[str, Any] | None) -> str:
    """Return what is printed: the text itself where process 0 has failed in the same way."""
    cut = lambda text: text.split("; the traceback is in ")[0]  # noqa: E731
    if mine and (first["index"] == mine["index"] or cut(first["text"]) == cut(mine["text"])):
        return mine["text"]
    return f"process {first['index']} ({first['host']}) failed: {first['text'].removeprefix('error: ')}"
