"""Files on disks and object stores: written whole, copied, verified, and their failures told apart.

Functions that say `Any` for a path take etils' paths, which are local or remote.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aether.errors import InputError, StorageError

REASONS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota reached",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
    errno.EACCES: "no permission",
    errno.EPERM: "not permitted",
}

# Reasons for which sound files cannot be read at the moment; TensorStore's, which come in an error's text.
NOT_DAMAGE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
FULL = ("No space left", "RESOURCE_EXHAUSTED", "Disk quota exceeded")
BLOCK = 1 << 20  # bytes read at a time


class DamagedError(StorageError):
    """Files that are there, but not as they were written, so that an older copy may serve."""


def check_shared(path: str, processes: int) -> None:
    """Raise `InputError` unless this many processes can write to the workdir `path`."""
    if processes > 1 and path.startswith("s3://"):
        raise InputError(
            f"--workdir is on s3:// ({path}) and the run has {processes} processes; several processes write to gs:// "
            "or to a file system that all share."
        )


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn the `OSError`s of a full or broken disk into `StorageError`s that name `path` and the reason."""
    try:
        yield
    except OSError as e:
        if e.errno not in REASONS:
            raise
        cure = "free some space" if is_full(e) else "make it writable, or choose another folder"
        raise StorageError(f"Cannot write {path}: {REASONS[e.errno]}; {cure}, then run the same command again.") from e


def new_folder(path: str, flag: str) -> Path:
    """Return the whole path of a folder that is to be made.

    Raises:
      InputError: it is remote, or is there and not an empty folder, or is a link or a mounted volume.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if "://" in path or folder.is_symlink() or folder.is_mount():
        raise InputError(f"--{flag} is {path}; give a new local folder, not a remote one, a link or a volume.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--{flag} is {path}, which is there and not empty; give a new folder.")
    return folder


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `folder`, of `new_folder`, at the end: whole or not at all.

    What is put beside it goes in any case, as do parents that were made for it and are not used.

    Raises:
      InputError: `folder` has got content meanwhile.
      StorageError: it cannot be written.
    """
    with storage_errors(folder):
        parents = [p for p in folder.parents if not p.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                yield made
                _take_place(made, folder)
        finally:
            for parent in parents:
                if not any(parent.iterdir()):
                    parent.rmdir()


def _take_place(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InputError(f"{folder} is not empty any more, and stays as it is; give a new folder.") from e


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Replace a file whole by these parts: after a crash there is the old content or the new one, never a piece.

    Raises:
      StorageError: the disk is full or cannot be written; the old file is untouched.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with open(handle, "wb") as f:
                os.fchmod(f.fileno(), 0o644)
                f.writelines(parts)
                f.flush()
                os.fsync(f.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def copy_folder(source: Any, target: Any) -> None:
    """Copy every file below `source` to the same place below `target`."""
    for file in files_of(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as read, place.open("wb") as write:
            shutil.copyfileobj(read, write, BLOCK)


@contextlib.contextmanager
def local_copy(folder: Any) -> Iterator[Any]:
    """Yield a copy of a folder on this machine's disk, deleted afterwards."""
    from etils import epath

    with tempfile.TemporaryDirectory(prefix="aether-") as name:
        copy = epath.Path(name)
        copy_folder(folder, copy)
        yield copy


def files_of(folder: Any) -> Iterator[Any]:
    """Yield every file below a folder."""
    for item in folder.iterdir():
        if item.is_dir():
            yield from files_of(item)
        else:
            yield item


def write_through(file: Any, text: str) -> None:
    """Write a file and, on a disk, return only when it is there."""
    with file.open("w") as f:
        f.write(text)
        f.flush()
        if _is_local(file):
            os.fsync(f.fileno())


def settle(path: Any) -> None:
    """Return when a local file's content, or a folder's names, are on the disk and outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def persist(folder: Any) -> None:
    """Return when all files below a local folder are on the disk; object stores see to it by themselves."""
    if _is_local(folder):
        for item in folder.iterdir():
            if item.is_dir():
                persist(item)
            else:
                settle(item)
        settle(folder)


def fingerprint(file: Any, sums: bool, fresh: bool = False) -> list[int]:
    """Return [bytes], or [bytes, CRC-32] with `sums`; `fresh` has them read from the disk, not from its cache."""
    size = file.stat().length
    if not sums:
        return [size]
    crc = 0
    with file.open("rb") as read:
        if fresh and _is_local(file) and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(read.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := read.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return [size, crc]


def _is_local(path: Any) -> bool:
    return "://" not in os.fspath(path)


def verify(folder: Any, files: dict[str, list[int]], sums: bool, fresh: bool = False) -> None:
    """Compare files with their fingerprints; without `sums`, go by the size.

    Raises:
      DamagedError: the first file that is not as it was written.
    """
    for name, (size, *crc) in files.items():
        if not (folder / name).exists():
            raise DamagedError(f"{name} is missing")
        now = fingerprint(folder / name, sums and bool(crc), fresh)
        if now[0] != size:
            raise DamagedError(f"{name} has {now[0]} bytes, not {size}")
        if now[1:] != crc[: len(now) - 1]:
            raise DamagedError(f"{name} has another checksum than when it was written")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_full(error: BaseException) -> bool:
    """Tell a full disk or quota, from the error number or from the words of TensorStore and fsspec."""
    for e in causes(error):
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        on_device = type(e).__name__ == "JaxRuntimeError"  # its RESOURCE_EXHAUSTED is device memory
        if not on_device and any(mark in str(e) for mark in FULL):
            return True
    return False


def is_damage(error: Exception) -> bool:
    """Tell files with wrong content from those that cannot be reached at the moment; lack of memory is raised on."""
    if isinstance(error, OSError):
        return isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise error
    return not any(mark in str(error) for mark in NOT_DAMAGE)


def one_line(error: BaseException) -> str:
    """Return the start of an error's text, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
