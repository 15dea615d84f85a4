"""Objects on `gs://`, `s3://` and whatever else fsspec has a driver for: listed, read in ranges, written.

Drivers have no exceptions in common, so failures are told apart here: what may pass is tried again for some seconds.
"""

import datetime
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aether.errors import AetherError, InputError, StorageError

# Protocol -> the extra of this package that installs its fsspec driver.
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# What tells versions of a remote object apart: the first of these that its file system reports.
VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
PATIENCE = 10  # seconds after which no further try begins: drivers have retries of their own, gcsfs half a minute
BLOCK = 8 << 20  # bytes a request while a file is read from its beginning
LASTING = (PermissionError, IsADirectoryError, NotImplementedError, TypeError)
REFUSED = ("credential", "forbidden", "denied", "unauthorized", "unauthorised", "anonymous", "invalid_grant")


class MissingError(InputError):
    """A remote file, folder or bucket that is not there."""


@dataclass(frozen=True)
class Object:
    """A remote file as a listing shows it; `version` changes whenever its content does."""

    address: str
    size: int
    version: str


def is_remote(path: str) -> bool:
    """Return whether a path is an address with a protocol."""
    return "://" in path


def connect(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path within it.

    Raises:
      InputError: its driver is not installed, or there is none.
    """
    protocol = address.split("://")[0]
    try:
        import fsspec

        fs, path = attempt(address, "read", lambda: fsspec.core.url_to_fs(address))
        log = logging.getLogger(type(fs).__module__.split(".")[0])
        if log.level == logging.NOTSET:
            log.setLevel(logging.CRITICAL)  # drivers log each failed try with its stack; our errors say it once
        return fs, path
    except ImportError as e:
        extra = EXTRAS.get(protocol)
        cure = f'pip install "aether[{extra}]"' if extra else "install the fsspec driver for it"
        raise InputError(f"{address} needs the driver for {protocol}://, which is not installed; {cure}.") from e


def attempt(address: str, verb: str, call: Callable[[], Any]) -> Any:
    """Return `call()`, tried again after a while where the failure may pass.

    Raises:
      MissingError: the object, or its bucket, does not exist.
      StorageError: it cannot be reached, or may not be (74).
    """
    begin = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError) as e:
            what = "does not exist" if verb == "read" else "cannot be written, because its bucket does not exist"
            raise MissingError(f"{address} {what}; check the address.") from e
        except (ImportError, AetherError):
            raise
        except ValueError as e:
            raise InputError(
                f"{address} is not an address ({_reason(e)}); give gs://BUCKET/... or s3://BUCKET/..."
            ) from e
        except Exception as e:
            if wait is None or _lasts(e) or time.monotonic() - begin > PATIENCE:
                participle = {"read": "read", "write": "written"}[verb]
                raise StorageError(
                    f"{address} cannot be {participle}: {_reason(e)}; check the address, the network and your "
                    "credentials, then run the same command again."
                ) from e
            time.sleep(wait)
    raise AssertionError("unreachable")


def _lasts(error: Exception) -> bool:
    """Tell a refusal, which another try meets too, from a lost connection."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, LASTING) or any(word in text for word in REFUSED)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def version(info: dict[str, Any]) -> str:
    """Tell versions of an object apart; listings and single answers differ in how they write a time."""
    mark = next((info[k] for k in VERSION_KEYS if info.get(k) is not None), "")
    mark = mark.timestamp() if isinstance(mark, datetime.datetime) else str(mark).strip('"')
    return f"{info['size']} {mark}"


def find(address: str) -> tuple[list[Object], bool]:
    """List the object at an address, or all that lie below it, and say whether it is one object.

    Raises:
      MissingError: nothing is there.
    """
    fs, path = connect(address)

    def ask() -> tuple[dict[str, dict], bool]:
        fs.invalidate_cache()
        info = fs.info(path)
        single = info["type"] == "file"
        return ({path: info} if single else fs.find(path, detail=True)), single

    found, single = attempt(address, "read", ask)
    return _objects(address, found), single


def glob(pattern: str) -> list[Object]:
    """List the objects that match a pattern; none is no error."""
    fs, path = connect(pattern)

    def ask() -> dict[str, dict]:
        fs.invalidate_cache()
        return fs.glob(path, detail=True)

    try:
        return _objects(pattern, attempt(pattern, "read", ask))
    except MissingError:
        return []


def _objects(address: str, found: dict[str, dict]) -> list[Object]:
    """Turn a listing into objects with addresses; stand-ins for folders are left out."""
    protocol, _, rest = address.partition("://")
    files = {name if rest.startswith("/") else name.lstrip("/"): i for name, i in found.items() if i["type"] == "file"}
    return [Object(f"{protocol}://{n}", i["size"], version(i)) for n, i in sorted(files.items()) if n[-1:] != "/"]


def read(address: str) -> bytes:
    """Return all of a small object."""
    fs, path = connect(address)
    return attempt(address, "read", lambda: fs.cat_file(path))


def read_range(fs: Any, path: str, address: str, begin: int, end: int) -> bytes:
    """Return the bytes [begin, end) of an object; fewer are a lost connection."""

    def ask() -> bytes:
        content = fs.cat_file(path, start=begin, end=end)
        if len(content) != end - begin:
            raise ConnectionError(f"{len(content)} of the {end - begin} bytes from {begin} on arrived")
        return content

    return attempt(address, "read", ask)


def write(address: str, *parts: Any) -> None:
    """Write an object whole; object stores show it only when all of it has arrived."""
    fs, path = connect(address)
    content = b"".join(parts)
    attempt(address, "write", lambda: fs.pipe_file(path, content))


def open_stream(address: str) -> io.BufferedReader:
    """Open an object for reading from any position; a lost connection is taken up where it broke."""
    return io.BufferedReader(_Stream(address), BLOCK)


class _Stream(io.RawIOBase):
    """Range requests as a file."""

    def __init__(self, address: str):
        self._address, self._at = address, 0
        self._fs, self._path = connect(address)
        self._size = attempt(address, "read", lambda: self._fs.info(self._path))["size"]

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and return the position."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readall(self) -> bytes:
        """Return the rest; the one inherited asks for a few kilobytes at a time."""
        parts = iter(lambda: self.read(BLOCK), b"")
        return b"".join(part for part in parts if part)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or what is left of the object; 0 at its end."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        buffer[: end - self._at] = read_range(self._fs, self._path, self._address, self._at, end)
        count, self._at = end - self._at, end
        return count
