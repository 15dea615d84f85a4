"""Reading one file, local or remote: text, JSON lines and Parquet, plain or compressed."""

import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from typing import IO, Any

from aether import remote
from aether.errors import InputError, StorageError

COMPRESSED = (".gz", ".zst", ".xz")
Document = tuple[str, bytes]


def kind_of(file: str) -> str:
    """Return how a file is read, by its name: `jsonl`, `parquet` or `text`."""
    name = file.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return "jsonl" if name.endswith((".jsonl", ".ndjson")) else "parquet" if name.endswith(".parquet") else "text"


@contextlib.contextmanager
def storage(file: str) -> Iterator[None]:
    """Turn what goes wrong with reading a file into the errors that name it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{file} does not exist.") from e
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError) as e:
        raise InputError(f"{file} is damaged or not compressed as its name says ({e}).") from e
    except OSError as e:
        raise StorageError(f"{file} cannot be read: {e.strerror or e}.") from e


def open_plain(file: str) -> IO[bytes]:
    """Open a file, local or remote, for reading as it is."""
    return remote.open_stream(file) if remote.is_remote(file) else open(file, "rb")


@contextlib.contextmanager
def open_binary(file: str) -> Iterator[IO[bytes]]:
    """Open a file, local or remote, for reading, decompressed."""
    with open_plain(file) as raw:
        if file.endswith(".gz"):
            yield gzip.open(raw, "rb")  # type: ignore[misc]
        elif file.endswith(".xz"):
            yield lzma.open(raw, "rb")
        elif file.endswith(".zst"):
            yield io.BufferedReader(_Zstd(raw), 1 << 20)
        else:
            yield raw


def read_bytes(file: str) -> bytes:
    """Return all of a file, decompressed."""
    with storage(file), open_binary(file) as f:
        return f.read()


class _Zstd(io.RawIOBase):
    """A stream of zstd frames; unlike zstandard's own reader it raises `EOFError` where a file was cut off."""

    def __init__(self, source: IO[bytes]):
        self._chunks = self._decompressed(source)
        self._left = b""

    def _decompressed(self, source: IO[bytes]) -> Iterator[bytes]:
        import zstandard

        frame = None
        while raw := source.read(1 << 18):
            while raw:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(raw)
                except zstandard.ZstdError as e:
                    raise EOFError(str(e)) from e
                raw, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("it ends within a frame")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one piece goes; 0 at the end."""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def read_jsonl(file: str, name: str, key: str) -> Iterator[Document]:
    """Yield the text under `key` of each JSON line."""
    with storage(file), open_binary(file) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield f"{name}:{number}", _line_text(line, key, f"{file} line {number}")


def _line_text(line: bytes, key: str, where: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where} is not JSON ({e}); mend or remove the line.") from e
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {type(record).__name__}; each line takes an object with the key {key!r}.")
    return field_bytes(record, key, where)


def field_bytes(record: dict[str, Any], key: str, where: str) -> bytes:
    """Return the text under `key` of a record as bytes; raise `InputError` that names the place."""
    if key not in record:
        raise InputError(
            f"{where} has no {key!r}; it has {', '.join(map(repr, record))}: set data.text_key to one of them."
        )
    value = record[key]
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes):
            value.decode()
            return value
    except UnicodeError as e:
        raise InputError(f"{where} has text under {key!r} that is not valid Unicode ({e}); mend or remove it.") from e
    raise InputError(
        f"{where} has {type(value).__name__} under {key!r}; it takes text: set data.text_key to another key."
    )


def read_parquet(file: str, name: str, key: str) -> Iterator[Document]:
    """Yield the column `key`, row by row; nulls are left out."""
    import pyarrow
    import pyarrow.parquet

    with storage(file):
        try:
            with open_plain(file) as raw, pyarrow.parquet.ParquetFile(raw) as table:
                columns = table.schema_arrow.names
                if key not in columns:
                    have = ", ".join(map(repr, columns))
                    raise InputError(f"{file} has no column {key!r}; it has {have}: set data.text_key to one of them.")
                row = 0
                for batch in table.iter_batches(batch_size=1024, columns=[key]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if value is not None:
                            yield f"{name}:{row}", field_bytes({key: value}, key, f"{file} row {row}")
        except pyarrow.ArrowInvalid as e:
            raise InputError(f"{file} is not a Parquet file ({e}).") from e
