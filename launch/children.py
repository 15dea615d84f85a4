"""A process that `launch.local` starts: its lines marked, and never left behind."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

PR_SET_PDEATHSIG = 1


class Child:
    """A running command in a session of its own, so that a terminal's Ctrl-C reaches it only through its parent.

    It is killed with its parent, even when that is killed (Linux).
    """

    def __init__(self, index: int, command: list[str], env: Mapping[str, str], prefix: str = ""):
        self.index = index
        pipe = subprocess.PIPE if prefix else None
        ends = ends_with_parent()
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
            preexec_fn=ends,
        )
        streams = [(self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)] if prefix else []
        self._readers = [threading.Thread(target=_mark, args=(prefix, *pair), daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    def code(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send a signal to it; SIGKILL to what it has started, too."""
        with suppress(OSError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            elif self.code() is None:
                self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end, pass on its last lines, and return the exit code."""
        code = self._process.wait()
        for reader in self._readers:
            reader.join(5)
        return code


def _mark(prefix: str, source: IO[bytes], target: IO[str]) -> None:
    """Copy lines, each with the prefix."""
    for line in source:
        target.write(prefix + line.decode(errors="replace").rstrip("\r\n") + "\n")
        target.flush()


def ends_with_parent():  # type: ignore[no-untyped-def]
    """Return what a child calls to be killed when the thread that started it ends; None where that cannot be."""
    if sys.platform != "linux":
        return None
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent ended before

    return ask
