"""TFDS data sets that are prepared as ArrayRecord, on a disk or remote."""

import os
from collections.abc import Iterator
from typing import Any

from aether import remote
from aether.config import DataConfig
from aether.data.files import alone, cache_folder, key_of
from aether.data.records import Document, field_bytes
from aether.errors import InputError, StorageError

RECORDS = ".array_record"


def open_builder(path: str, config: DataConfig) -> tuple[Any, str, int | str]:
    """Return the builder behind `tfds:NAME[:SPLIT]`, the address of its files, and what tells their versions apart.

    Raises:
      InputError: no such data set, not prepared, or in another file format.
    """
    name, where = path.split(":")[1], config.tfds_dir
    if not remote.is_remote(where):
        builder = _builder(path, where, where or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
        mtime = max(os.stat(os.path.join(builder.data_dir, f)).st_mtime_ns for f in os.listdir(builder.data_dir))
        return builder, str(builder.data_dir), mtime
    mirror = _Mirror(where, name, config)
    mirror.fetch("")
    builder = _builder(path, mirror.local, where)
    return builder, where.rstrip("/") + str(builder.data_dir).removeprefix(mirror.local), mirror.version


def _builder(path: str, folder: str, where: str) -> Any:
    import tensorflow_datasets as tfds

    name = path.split(":")[1]
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


def open_split(path: str, split: str, config: DataConfig) -> Any:
    """Return the builder behind a path; the files of this split, where they are remote, are fetched whole first."""
    if remote.is_remote(config.tfds_dir):
        _Mirror(config.tfds_dir, path.split(":")[1], config).fetch(f"-{split}{RECORDS}")
    return open_builder(path, config)[0]


def read_split(path: str, split: str, config: DataConfig) -> Iterator[Document]:
    """Yield the feature `data.text_key` of each record of a split."""
    source = open_split(path, split, config).as_data_source(split)
    for i in range(len(source)):
        record = source[i]
        yield f"{path}:{split}:{i}", field_bytes(record, config.text_key, f"{path} record {i} of {split}")


class _Mirror:
    """A local copy of a remote data set, since ArrayRecord's reader takes files alone; of its records what is needed.

    Attributes:
      local: the folder that stands for `data.tfds_dir`.
      version: changes whenever a file does, and so does `local`.
    """

    def __init__(self, where: str, name: str, config: DataConfig):
        self._root = where.rstrip("/") + "/"
        try:
            self._found = remote.find(self._root + name.split(":")[0])[0]
        except remote.MissingError as e:
            raise InputError(f"tfds:{name} is not in {where}; see data.tfds_dir.") from e
        self.version = key_of([(o.address, o.size, o.version) for o in self._found])
        self.local = os.path.join(cache_folder(config), "tfds", self.version)

    def fetch(self, part: str) -> None:
        """Fetch the files with this in their names, or with "" all that are not records."""
        lacking = []
        for found in self._found:
            target = os.path.join(self.local, found.address.removeprefix(self._root))
            wanted = part in found.address if part else RECORDS not in found.address
            if wanted and not os.path.exists(target):
                lacking.append((found, target))
        if lacking:
            with alone(os.path.join(self.local, "lock"), lambda line: None):
                for found, target in lacking:
                    if not os.path.exists(target):
                        _download(found, target)


def _download(found: remote.Object, target: str) -> None:
    from tqdm import tqdm

    bar = tqdm(total=found.size, unit="B", unit_scale=True, delay=1, desc=f"fetching {found.address}")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with remote.open_stream(found.address) as source, open(f"{target}.tmp", "wb") as copy, bar:
            while block := source.read(remote.BLOCK):
                copy.write(block)
                bar.update(len(block))
        os.replace(f"{target}.tmp", target)
    except OSError as e:
        raise StorageError(
            f"{target} cannot be written: {e.strerror or e}; free some space, or set data.cache_dir to a larger disk."
        ) from e
