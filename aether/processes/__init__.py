"""Several processes that train one model: who is who, how they start together, how they end together.

`start` comes before JAX has a backend; `end` when a process fails. With one process they do nothing.
"""

import hashlib
import inspect
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from aether.config import Config
from aether.errors import InputError, Stopped
from aether.processes import rollcall
from aether.processes.cluster import Cluster, find
from aether.processes.peers import Peers
from aether.storage import check_shared

__all__ = ["Cluster", "end", "find", "start"]


@dataclass
class _Standing:
    """How far this process has come: there is one of these, as there is one connection to the others."""

    cluster: Cluster | None = None
    told: rollcall.Told | None = None  # how all end
    unheard: bool = False
    peers: Peers | None = None
    connected: bool = False


_MINE = _Standing()


def start(config: Config, workdir: str) -> None:
    """Meet the other processes, compare configs, versions and workdir, and connect JAX; print who is where.

    Nothing happens where this process is alone, or connected already.

    Raises:
      InputError: a variable that says who this is is missing or wrong (2).
      AetherError: the others do not come within `faults.start_timeout_seconds` (1), or do not fit (2): on all of them.
    """
    c = _MINE.cluster = find()
    if c.count == 1 or _MINE.peers:
        return
    check_shared(workdir, c.count)
    mine = rollcall.hello_of(c) | dict(versions=_versions(), config=config.to_json())
    mine["workdir"] = workdir.rstrip("/") if rollcall.is_remote(workdir) else ""
    meet = rollcall.attend if c.index else rollcall.hold
    try:
        meet(c, mine, workdir, config.faults.start_timeout_seconds, _say)
    except rollcall.Told as e:
        _MINE.told = e
        raise InputError(str(e)) if e.exit_code == InputError.exit_code else e from None
    except rollcall.Unheard:
        _MINE.unheard = True
        raise
    try:
        _connect(c, config)
        _MINE.connected = True
    finally:
        client = _client()
        _MINE.peers, _MINE.unheard = Peers(c, client) if client else None, client is None


def end(text: str, code: int) -> int:
    """Print how this process ends, or let process 0 do so for all, and return the exit code.

    Where others are still in the middle of their work they are told, and the process ends here.
    """
    try:
        c = _MINE.cluster or find()
    except InputError:
        c = Cluster()  # nobody knows who this is, so each process speaks for itself
    if c.count == 1 or _MINE.unheard:
        _say(text)
        return code
    if _MINE.peers and not (_MINE.connected and code == Stopped.exit_code):  # those leave together, by JAX's own way
        _MINE.peers.end(text, code)
    if c.index == 0:
        _say(text)
    left = _MINE.told.left if _MINE.told else c.count - 1
    if _MINE.peers or (_MINE.told and not left):
        return code
    answer = rollcall.excuse(c, text.removeprefix("error: "), code, left)
    if c.index and answer is None:
        _say(text)
    return code if answer is None else answer


def _connect(c: Cluster, config: Config) -> None:
    """Start JAX's distributed runtime."""
    import jax

    if hasattr(jax.config, "jax_cpu_collectives_implementation"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the loop's handler
    wanted: dict[str, Any] = dict(
        local_device_ids=list(c.devices) or None,
        cluster_detection_method="deactivate",
        initialization_timeout=config.faults.start_timeout_seconds,
        heartbeat_timeout_seconds=config.faults.heartbeat_timeout_seconds,
    )
    known = inspect.signature(jax.distributed.initialize).parameters
    jax.distributed.initialize(
        c.coordinator, c.count, c.index, **{name: value for name, value in wanted.items() if name in known}
    )


def _client() -> Any:
    """Return the connection to JAX's coordination service, None if there is none."""
    from jax._src import distributed  # the only way to it; Orbax and Flax go it too

    return distributed.global_state.client


def _versions() -> dict[str, str]:
    """Return what has to be the same everywhere, the code of this package too."""
    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    found = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    python = ".".join(platform.python_version_tuple()[:2])
    return found | {"python": python, "the code of aether": code.hexdigest()[:12]}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
