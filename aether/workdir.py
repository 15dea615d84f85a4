"""The run folder: a local one, or a remote one with a local mirror.

Object stores cannot append, so a remote run (`gs://`, `s3://`) keeps everything but its checkpoints in a mirror
under `$AETHER_CACHE`, and `Workdir.sync` uploads what changed. The remote is the truth: opening fetches it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from aether.config import dumps
from aether.errors import InputError, StorageError
from aether.remote import connect
from aether.remote import version as version_of
from aether.storage import storage_errors, write_atomic

CHECKPOINTS = "checkpoints"
LOCK = ".lock"  # there while a process trains, and says which
PATIENCE = 1.0  # seconds in which a process that was killed is gone, and one that has just begun has said which it is
INDEX = ".index.json"  # in a mirror: name -> [version on the remote, size and time of the local file]


class Workdir:
    """Where a run keeps its files; `file(name)` is always a local path, `checkpoints` may be remote.

    Attributes:
      path: the folder as a string: absolute if local, else the remote address.
      local: the folder itself, or the mirror of the remote one.
      remote: whether it is a remote one.
      primary: whether this process writes; others only read (and mirror apart from the writer).
    """

    def __init__(self, path: str, *, primary: bool = True, flag: str = "workdir") -> None:
        if not path:
            raise InputError(f"--{flag} is empty; give a folder, or a gs:// or s3:// address.")
        self.primary = primary
        path = path.removeprefix("file://")
        self.remote = "://" in path
        self._lock = threading.Lock()
        if self.remote:
            self.path = path.rstrip("/")
            self.local = _mirror(self.path, primary)
            self._fs, self._root = connect(self.path)
            self._fetch()
        else:
            self.local = Path(os.path.abspath(os.path.expanduser(path)))
            self.path = str(self.local)
            _check_folder(self.local, flag)

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints, remote if the run is."""
        return f"{self.path}/{CHECKPOINTS}"

    def exists(self, name: str = "config.json") -> bool:
        """Say whether the run has this file; by default: whether there is a run at all."""
        return (self.local / name).exists()

    def file(self, name: str) -> Path:
        """Return the local path of a file, its folder made if this process writes."""
        path = self.local / name
        if self.primary:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content.

        Raises:
          InputError: there is no such file.
          StorageError: it cannot be read, or is not JSON.
        """
        try:
            return json.loads((self.local / name).read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise InputError(f"{self.path} has no {name}; give the --workdir of a run that has started.") from e
        except (OSError, ValueError) as e:
            raise StorageError(f"Cannot read {self.local / name}: {e}") from e

    def write_json(self, name: str, record: Any) -> None:
        """Write a JSON file atomically (process 0 only)."""
        if self.primary:
            write_atomic(self.local / name, dumps(record).encode())

    def leave(self, name: str, content: bytes) -> str:
        """Write a file that no other process writes, from any of them and at once; return its address."""
        if self.remote:
            with self._remote_errors("write"):
                self._fs.pipe_file(f"{self._root}/{name}", content)
        else:
            write_atomic(self.local / name, content)
        return f"{self.path}/{name}"

    def check_writable(self) -> None:
        """Refuse a local folder that cannot be written: before the work rather than after it.

        Raises:
          StorageError: it cannot.
        """
        if not self.remote:
            with storage_errors(self.local):
                self.local.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.local).close()

    @contextlib.contextmanager
    def alone(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold a local folder, so that no other process trains in it; what was made for that is gone afterwards.

        The system lets go of it when this process dies, however that is; programs that it started do not keep it.
        Of several processes that train together the first one does this. Object stores have no locks, so `gs://` and
        `s3://` are never held, nor is a folder on a file system without them or one that cannot be written, which `say`
        is told.

        Raises:
          InputError: another process holds it.
        """
        file, lock = self.local / LOCK, None
        made = [p for p in (self.local, *self.local.parents) if not p.exists()]
        if not self.remote:
            try:
                lock = _locked(file)
            except OSError as e:
                say(f"warning: {self.path} cannot be locked ({e.strerror}); see to it that nothing else trains there")
        try:
            yield
        finally:
            if lock:
                with lock, contextlib.suppress(OSError):
                    if _is_at(file, lock):
                        file.unlink()  # while it is held: a moment later it may be another's
                with contextlib.suppress(OSError):
                    for folder in made:
                        folder.rmdir()  # if nothing was written

    def sync(self, *names: str) -> None:
        """Upload these files, or all, where they changed since the last time; nothing to do for a local folder."""
        if not (self.remote and self.primary):
            return
        with self._lock:
            files = [self.local / name for name in names] if names else _files(self.local)
            for path in files:
                stamp = _stamp(path)
                name = path.relative_to(self.local).as_posix()
                if stamp is None or self._index.get(name, [None, None])[1] == stamp:
                    continue
                with self._remote_errors("write"):
                    self._fs.pipe_file(f"{self._root}/{name}", path.read_bytes())
                    version = version_of(self._fs.info(f"{self._root}/{name}"))
                self._index[name] = [version, stamp]
                self._save_index()

    def _fetch(self) -> None:
        """Make the mirror equal to the remote: download what differs, delete what is not there."""
        path = self.local / INDEX
        self._index: dict[str, list] = json.loads(path.read_bytes()) if path.exists() else {}
        with self._remote_errors("read"):
            remote = self._list()
        for name, version in remote.items():
            target = self.local / name
            stamp = _stamp(target)
            if stamp is None or self._index.get(name) != [version, stamp]:
                with self._remote_errors("read"):
                    content = self._fs.cat_file(f"{self._root}/{name}")
                write_atomic(target, content)
                self._index[name] = [version, _stamp(target)]
        for target in _files(self.local):
            if target.relative_to(self.local).as_posix() not in remote:
                target.unlink(missing_ok=True)
        self._index = {name: entry for name, entry in self._index.items() if name in remote}
        self._save_index()

    def _list(self) -> dict[str, str]:
        """Map the remote's files, checkpoints aside, to what tells their versions apart."""
        found: list[dict] = []
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            for entry in self._fs.ls(self._root, detail=True):
                if entry["type"] == "file":
                    found.append(entry)
                elif entry["name"].rstrip("/").rsplit("/", 1)[-1] != CHECKPOINTS:
                    found += self._fs.find(entry["name"], detail=True).values()
        prefix = self._root.strip("/") + "/"
        named = {e["name"].strip("/").removeprefix(prefix): version_of(e) for e in found if not e["name"].endswith("/")}
        return {name: version for name, version in named.items() if not _hidden(name)}

    def _save_index(self) -> None:
        write_atomic(self.local / INDEX, json.dumps(self._index).encode())

    @contextlib.contextmanager
    def _remote_errors(self, verb: str) -> Iterator[None]:
        """Turn whatever the remote's driver raises into a `StorageError`: drivers have no exceptions in common."""
        try:
            yield
        except Exception as e:
            hint = "Check the address, the network and your credentials"
            raise StorageError(f"Cannot {verb} {self.path}: {type(e).__name__}: {e}. {hint}.") from e


def _mirror(path: str, primary: bool) -> Path:
    """Return the stable local folder for a remote one; readers have their own, lest they undo a writer's lines."""
    cache = Path(os.environ.get("AETHER_CACHE") or "~/.cache/aether").expanduser()
    slug = re.sub(r"[^\w.-]+", "_", path)[-80:] + "-" + hashlib.sha256(path.encode()).hexdigest()[:12]
    return cache.absolute() / "workdirs" / (slug if primary else slug + "-reader")


def _check_folder(path: Path, flag: str) -> None:
    """Refuse a path that is a file, or leads through one."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise InputError(f"--{flag} is {path}, but {part} is a file; give a folder.")
            return


def _locked(path: Path) -> IO[bytes]:
    """Return the file `path`, made if need be and locked by this process.

    Raises:
      InputError: another process has locked it.
      OSError: it cannot be made or locked.
    """
    end = time.monotonic() + PATIENCE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as unless_locked:
            file = unless_locked.enter_context(open(path, "ab+", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, file) or time.monotonic() > end:  # else it was removed meanwhile, which soon shows
                    with contextlib.suppress(OSError):  # a full disk
                        file.truncate(0)
                        file.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
                        os.fsync(file.fileno())  # for who looks from another machine
                    unless_locked.pop_all()
                    return file
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    who = file.read(1000).decode(errors="replace") or "it has not said which"
                    raise InputError(
                        f"Another process ({who}) trains in {path.parent}; "
                        "wait until it ends, or give another --workdir."
                    ) from None
        time.sleep(0.02)


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _files(folder: Path) -> list[Path]:
    """List the files that a mirror shares with its remote: no links, nothing hidden."""
    found = (p for p in folder.rglob("*") if not p.is_symlink() and p.is_file())
    return sorted(p for p in found if not _hidden(p.relative_to(folder).as_posix()))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _stamp(path: Path) -> list[int] | None:
    """Return what tells versions of a local file apart, or None if it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]
