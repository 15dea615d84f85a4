"""The roll call: all processes meet at the coordinator's address before JAX takes it over.

Process 0 listens, the others say who they are, each a line of JSON. Process 0 prints who is where and who is missing,
compares, and gives all the same answer: go, or how everyone ends. JAX by itself says neither who is missing nor why.
"""

import errno
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aether.config import build, differences
from aether.errors import AetherError, InputError
from aether.processes.cluster import Cluster
from aether.processes.desk import GREETING, PATIENCE, Desk, Line

Say = Callable[[str], None]
Hello = dict[str, Any]
TOLD = 5.0  # seconds between lines that say who is waited for
LOCAL = "in a folder"
SHARED = 30.0  # seconds for a file to show on other machines, which a network file system may take
EXCUSED = 30.0  # seconds in which a process that cannot start tells the others


class Told(AetherError):
    """How everyone ends, as process 0 says; it alone prints it, and then tells those `left` who have not come yet."""

    def __init__(self, text: str, code: int, left: int = 0):
        super().__init__(text)
        self.exit_code, self.left = code, left


class Late(AetherError):
    """Some processes did not come in time."""


class Unheard(AetherError):
    """Process 0 does not answer, so that each process says so by itself."""


def hold(c: Cluster, mine: Hello, workdir: str, seconds: float, say: Say) -> None:
    """As process 0, wait for the others, compare them with `mine` and tell all to go.

    Raises:
      Told: some do not come, or do not fit; all have heard it.
    """
    end = time.monotonic() + seconds
    desk = Desk(_listen(c, end, seconds, say))
    here: dict[int, tuple[Hello, Line]] = {}
    try:
        _gather(c, mine, desk, here, end, seconds, say)
        if not is_remote(workdir):
            _share(workdir, here)
        desk.close()
        for _, line in here.values():
            line.send({"go": True})
    except AetherError as e:
        for _, line in here.values():
            line.send({"text": str(e), "code": e.exit_code})
        raise Told(str(e), e.exit_code, 0 if isinstance(e, Late) else c.count - 1 - len(here)) from None
    finally:
        desk.close()
        for _, line in here.values():
            line.close()


def _gather(
    c: Cluster, mine: Hello, desk: Desk, here: dict[int, tuple[Hello, Line]], end: float, seconds: float, say: Say
) -> None:
    say(f"process 0 of {c.count}: {mine['host']}, pid {mine['pid']}")
    begin, told = time.monotonic(), 0.0
    while missing := [i for i in range(1, c.count) if i not in here]:
        now = time.monotonic()
        if now >= end:
            came = ", ".join([f"0 on {mine['host']}", *(f"{i} on {h['host']}" for i, (h, _) in sorted(here.items()))])
            raise Late(
                f"{_several(missing)} of {c.count} did not come to {c.coordinator} within {seconds:.0f} s (here: "
                f"{came}); look why, see that {c.source} is the same everywhere, or raise faults.start_timeout_seconds."
            )
        if now - told >= TOLD:
            say(f"waiting for {_several(missing).lower()} at {c.coordinator} ({now - begin:.0f} s of {seconds:.0f} s)")
            told = now
        if guest := desk.next(min(end, told + TOLD) - now):
            _enter(c, mine, *guest, here)
            say(f"process {guest[0]['index']} of {c.count}: {guest[0]['host']}, pid {guest[0]['pid']}")
        for i in [i for i, (_, line) in here.items() if not line.alive()]:
            hello, line = here.pop(i)
            line.close()
            say(f"process {i} ({hello['host']}) has left again")


def _enter(c: Cluster, mine: Hello, hello: Hello, line: Line, here: dict[int, tuple[Hello, Line]]) -> None:
    """Let a process in; one that does not fit is an error of all."""
    index, other = hello["index"], here.get(hello["index"])
    if other and other[1].alive() or not 0 < index < c.count:
        index = -1 - len(here)  # it has no place, but hears the answer
    here[index] = hello, line
    if "failed" in hello:
        text, code = hello["failed"]
        raise Told(f"process {hello['index']} ({hello['host']}) cannot start: {text}", code)
    if hello["count"] != c.count:
        raise InputError(
            f"Process {hello['index']} ({hello['host']}) counts {hello['count']} processes and process 0 "
            f"({mine['host']}) {c.count}; give all the same number."
        )
    if index < 0:
        first = other[0] if other else mine
        raise InputError(
            f"Two processes call themselves {hello['index']}: on {first['host']} (pid {first['pid']}) and on "
            f"{hello['host']} (pid {hello['pid']}); give each a number of its own."
        )
    _compare(mine, hello)


def _compare(mine: Hello, hello: Hello) -> None:
    """Raise `InputError` if another process would train something else, or with something else."""
    who = f"Process {hello['index']} ({hello['host']})"
    for name, version in mine["versions"].items():
        other = hello["versions"].get(name)
        if other != version:
            raise InputError(
                f"{who} has {name} {other} and process 0 ({mine['host']}) {version}; install the same everywhere."
            )
    for key, here, there, _ in differences(build(mine["config"]), build(hello["config"])):
        raise InputError(
            f"{who} has {key}={there!r} and process 0 ({mine['host']}) {here!r}; give all the same config."
        )
    if mine["workdir"] != hello["workdir"]:
        raise InputError(
            f"{who} has the workdir {hello['workdir'] or LOCAL} and process 0 ({mine['host']}) "
            f"{mine['workdir'] or LOCAL}; give all the same --workdir."
        )


def _share(workdir: str, here: dict[int, tuple[Hello, Line]]) -> None:
    """Raise `InputError` unless all see the file that process 0 puts into the workdir."""
    folder, token = _local(workdir), f".here-{secrets.token_hex(8)}"
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).write_text(token)
    except OSError:
        return  # what is wrong with the folder is told when the run opens it
    try:
        for _, line in here.values():
            line.send({"token": token})
        for index, (hello, line) in sorted(here.items()):
            if not (line.receive(SHARED + PATIENCE) or {}).get("sees"):
                raise InputError(
                    f"Process {index} ({hello['host']}) does not see the workdir {folder} of process 0; give a "
                    "--workdir on a file system that all share, or on gs://."
                )
    finally:
        with suppress(OSError):
            (folder / token).unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()


def attend(c: Cluster, mine: Hello, workdir: str, seconds: float, say: Say) -> None:
    """As another process, say hello to process 0 and wait for its answer.

    Raises:
      Told: all end, as process 0 says.
      Unheard: it does not answer.
    """
    begin = time.monotonic()
    last = begin + seconds + PATIENCE
    while True:
        line = _reach(c, begin, seconds, say)
        try:
            answer = line.receive(last - time.monotonic()) if line.send(mine) else None
            if answer and "token" in answer:
                line.send({"sees": _sees(_local(workdir) / answer["token"])})
                answer = line.receive(seconds + PATIENCE)
        finally:
            line.close()
        if answer and answer.get("go"):
            return
        if answer:
            raise Told(answer["text"], answer["code"])
        if time.monotonic() > last:
            raise Unheard(
                f"What answers at {c.coordinator} (by {c.source}) is not process 0 of this run: process {c.index} "
                f"({socket.gethostname()}) has asked it for {seconds:.0f} s; end the job that holds the port, or give "
                "another port."
            )
        time.sleep(0.5)  # something else listens there, or process 0 has gone and may come again


def excuse(c: Cluster, text: str, code: int, left: int) -> int | None:
    """Tell the others that this process cannot start; return the exit code that process 0 says, None if it does not.

    Process 0 tells the next `left` who come within some seconds.
    """
    hello = hello_of(c) | {"failed": [text, code]}
    try:
        if c.index == 0:
            _dismiss(c, left, {"text": text, "code": code})
        else:
            attend(c, hello, "", EXCUSED, lambda line: None)
    except Told as e:
        return e.exit_code
    except (AetherError, KeyboardInterrupt):
        pass
    return None


def _dismiss(c: Cluster, left: int, answer: dict[str, Any]) -> None:
    end = time.monotonic() + EXCUSED
    desk = Desk(_listen(c, end, EXCUSED, lambda line: None))
    while left > 0 and (guest := desk.next(end - time.monotonic())):
        guest[1].send(answer)
        guest[1].close()
        left -= 1
    desk.close()


def hello_of(c: Cluster) -> Hello:
    """Return what every process says of itself."""
    return dict(greeting=GREETING, index=c.index, count=c.count, host=socket.gethostname(), pid=os.getpid())


def _listen(c: Cluster, end: float, seconds: float, say: Say) -> socket.socket:
    """Return a socket at the port that JAX's coordinator will have, once whoever has it now gives it up."""
    port, told = c.address()[1], False
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    while True:
        try:
            dual = not bind and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual or ":" in bind else socket.AF_INET
            return socket.create_server((bind, port), family=family, dualstack_ipv6=dual, backlog=1024)
        except OSError as e:
            if e.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise Unheard(
                    f"Process 0 cannot listen at port {port} of {c.coordinator} ({e.strerror}) by {c.source}; "
                    "end what holds it, or give another port."
                ) from e
        if not told:
            say(f"waiting for port {port}, which something else holds (at most {seconds:.0f} s)")
            told = True
        time.sleep(0.5)


def _reach(c: Cluster, begin: float, seconds: float, say: Say) -> Line:
    """Connect to process 0."""
    told, reason = begin, "it does not answer"
    while True:
        try:
            return Line(socket.create_connection(c.address(), timeout=PATIENCE))
        except OSError as e:
            reason = e.strerror or str(e)
        now = time.monotonic()
        if now - begin > seconds:
            raise Unheard(
                f"The coordinator {c.coordinator} (by {c.source}) has not answered process {c.index} "
                f"({socket.gethostname()}) in {seconds:.0f} s: {reason}; see that process 0 runs there and that its "
                "port can be reached, or raise faults.start_timeout_seconds."
            )
        if now - told > TOLD:
            say(f"waiting for the coordinator {c.coordinator} ({now - begin:.0f} s of {seconds:.0f} s)")
            told = now
        time.sleep(0.3)


def _sees(path: Path) -> bool:
    """Return whether a file is there, or soon is."""
    end = time.monotonic() + SHARED
    while time.monotonic() < end:
        with suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
            return path.read_text() == path.name
        time.sleep(0.5)
    return False


def is_remote(workdir: str) -> bool:
    """Return whether a workdir is an address with a protocol, the same for all by its name."""
    return "://" in workdir.removeprefix("file://")


def _local(workdir: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(workdir.removeprefix("file://"))))


def _several(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"Process {numbers[0]}"
    shown = [str(i) for i in numbers[:20]] + ([f"{len(numbers) - 20} more"] if len(numbers) > 20 else [])
    return f"Processes {', '.join(shown[:-1])} and {shown[-1]}"
