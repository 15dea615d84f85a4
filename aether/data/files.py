"""Small files and listings of a folder that is local or remote, and where this machine keeps what it has prepared."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aether import remote
from aether.config import DataConfig
from aether.errors import InputError, StorageError
from aether.storage import write_atomic

Log = Callable[[str], None]


def cache_folder(config: DataConfig) -> str:
    """Return where prepared corpora are kept."""
    return os.path.expanduser(config.cache_dir or os.environ.get("AETHER_CACHE") or "~/.cache/aether")


def key_of(record: Any) -> str:
    """Return a name for what a JSON value describes."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:24]


def read(path: str) -> bytes | None:
    """Return the content of a file, or None where there is none."""
    if remote.is_remote(path):
        try:
            return remote.read(path)
        except remote.MissingError:
            return None
    try:
        with open(path, "rb") as f:
            return f.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as e:
        raise StorageError(f"{path} cannot be read: {e.strerror}.") from e


def read_json(path: str) -> dict[str, Any] | None:
    """Return a JSON object, or None where there is no file or no object in it."""
    content = read(path)
    try:
        record = json.loads(content) if content is not None else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def write(path: str, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all, its folder made."""
    if remote.is_remote(path):
        remote.write(path, *parts)
        return
    try:
        write_atomic(Path(path), *parts)
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e.strerror or e}; give another folder.") from e


def write_json(path: str, record: dict[str, Any]) -> None:
    """Write a JSON object."""
    write(path, json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")


def write_array(path: str, array: np.ndarray) -> None:
    """Write an array as .npy."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write(path, header.getvalue(), array.data.cast("B"))


def sizes(folder: str) -> dict[str, int]:
    """Return name -> bytes of the files directly in a folder; none where it does not exist."""
    if remote.is_remote(folder):
        with contextlib.suppress(remote.MissingError):
            root = folder.rstrip("/") + "/"
            found = {o.address.removeprefix(root): o.size for o in remote.find(folder)[0]}
            return {name: size for name, size in found.items() if "/" not in name}
        return {}
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise StorageError(f"{folder} cannot be read: {e.strerror}.") from e


@contextlib.contextmanager
def alone(file: str, log: Log) -> Iterator[None]:
    """Hold a lock on this machine, so that processes started together do a thing once; those that wait say so."""
    folder = os.path.dirname(file)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(file, "wb")  # noqa: SIM115
    except FileExistsError as e:
        raise InputError(f"{folder} is a file; give a folder to prepare into.") from e
    except OSError as e:
        raise StorageError(f"{folder} cannot be written: {e.strerror}; give another folder (data.cache_dir).") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process, which prepares {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            raise StorageError(f"{file} cannot be locked: {e.strerror}; set data.cache_dir to a local disk.") from e
        yield
