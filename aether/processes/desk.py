"""Lines of JSON between processes, before JAX connects them: a connection, and the server that process 0 is."""

import json
import queue
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any

GREETING = "aether-roll-call-1"
LONGEST = 1 << 20  # bytes of a line
PATIENCE = 10.0  # seconds for a line to arrive once a connection stands


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._rest = b""

    def send(self, message: Any) -> bool:
        """Send a message; return whether it went."""
        with suppress(OSError):
            self._socket.settimeout(PATIENCE)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            return True
        return False

    def receive(self, seconds: float) -> Any:
        """Return the next message, None if none comes in this time or the other side has gone or talks otherwise."""
        end = time.monotonic() + seconds
        with suppress(OSError, ValueError):
            while b"\n" not in self._rest and len(self._rest) < LONGEST:
                self._socket.settimeout(max(0.01, end - time.monotonic()))
                new = self._socket.recv(1 << 16)
                if not new:
                    return None
                self._rest += new
            line, _, self._rest = self._rest.partition(b"\n")
            return json.loads(line)
        return None

    def alive(self) -> bool:
        """Return whether the other side has not hung up."""
        with suppress(OSError, ValueError):
            poll = select.poll()  # select.select takes no descriptor beyond 1023
            poll.register(self._socket, select.POLLIN)
            return not poll.poll(0) or bool(self._socket.recv(1, socket.MSG_PEEK))
        return False

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class Desk:
    """Where process 0 waits for the others: a server that only lets in who greets as they do."""

    def __init__(self, listener: socket.socket):
        self._listener = listener
        self._came: queue.Queue[tuple[dict, Line]] = queue.Queue()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._greet, args=(Line(connection),), daemon=True).start()

    def _greet(self, line: Line) -> None:
        hello = line.receive(PATIENCE)
        if isinstance(hello, dict) and hello.get("greeting") == GREETING:
            self._came.put((hello, line))
            if self._closed:
                self._send_away()
        else:
            line.close()

    def next(self, seconds: float) -> tuple[dict, Line] | None:
        """Return the next who comes, None if nobody does in this time."""
        with suppress(queue.Empty):
            return self._came.get(timeout=max(0.0, seconds))
        return None

    def close(self) -> None:
        """Free the port for JAX; those who were let in stay connected."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._send_away()

    def _send_away(self) -> None:
        """Hang up on those who wait at the door, so that they do not wait for an answer."""
        while guest := self.next(0):
            guest[1].close()
