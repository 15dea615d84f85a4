"""Reading one file or data set: text, JSON lines, Parquet and TFDS, plain or compressed."""

import contextlib
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from typing import IO, Any

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


def open_binary(file: str) -> IO[bytes]:
    """Open a file for reading, decompressed."""
    if file.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.endswith(".xz"):
        return lzma.open(file, "rb")
    if file.endswith(".zst"):
        return io.BufferedReader(_Zstd(file), 1 << 20)
    return open(file, "rb")


def read_bytes(file: str) -> bytes:
    """Return all of a file, decompressed."""
    with storage(file), open_binary(file) as f:
        return f.read()


class _Zstd(io.RawIOBase):
    """A stream of zstd frames; unlike zstandard's own reader it raises `EOFError` where a file was cut off."""

    def __init__(self, file: str):
        self._chunks = self._decompressed(file)
        self._left = b""

    def _decompressed(self, file: str) -> Iterator[bytes]:
        import zstandard

        frame = None
        with open(file, "rb") as f:
            while raw := f.read(1 << 18):
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
            with pyarrow.parquet.ParquetFile(file) as table:
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


def tfds_builder(path: str, folder: str) -> Any:
    """Return the builder behind `tfds:NAME[:SPLIT]`, which must be prepared as ArrayRecord.

    Raises:
      InputError: no such data set, not prepared, or in another file format.
    """
    import tensorflow_datasets as tfds

    name = path.split(":")[1]
    where = folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0]
        raise InputError(f"{path}: TFDS has no data set {name!r} in {where} ({reason}); see data.tfds_dir.") from e
    if not builder.info.splits:
        raise InputError(
            f"{path} is not prepared in {where}; prepare it with TFDS (file format array_record) or set data.tfds_dir."
        )
    if builder.info.file_format.value != "array_record":
        have = builder.info.file_format.value
        raise InputError(
            f"{path} is prepared as {have}; it takes array_record: prepare it again with that file format."
        )
    return builder


def read_tfds(path: str, split: str, folder: str, key: str) -> Iterator[Document]:
    """Yield the feature `key` of each record of a split."""
    source = tfds_builder(path, folder).as_data_source(split)
    for i in range(len(source)):
        record = source[i]
        yield f"{path}:{split}:{i}", field_bytes(record, key, f"{path} record {i} of {split}")
