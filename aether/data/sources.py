"""Where text comes from: a path becomes a `Source`, a sorted list of items, and items become documents."""

import glob
import hashlib
import os
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from aether import remote
from aether.config import DataConfig
from aether.data import records, tfds
from aether.data.records import Document
from aether.errors import InputError, StorageError

STDLIB = "python:stdlib"
TFDS = "tfds:"
KEYS = "data.path (or data.mixture, data.validation)"
SMALL, AHEAD = 1 << 20, 64  # bytes of a remote text that is fetched ahead, and how many are
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Item:
    """A file or a TFDS split.

    `size` in bytes (or records) and `version` tell whether it changed: the time of change in ns, or what a remote
    listing reports.
    """

    name: str
    file: str
    kind: str
    size: int
    version: int | str


@dataclass(frozen=True)
class Source:
    """What a path stands for.

    Attributes:
      single: the path names one file, so that text which cannot be decoded is an error and not skipped.
      skipped: names of the files left out while reading, filled as documents are read.
    """

    path: str
    items: tuple[Item, ...]
    single: bool = False
    held_out: tuple[Item, ...] = ()
    skipped: list[str] = field(default_factory=list, compare=False)


def find_source(path: str, config: DataConfig, key: str = KEYS) -> Source:
    """Find the items behind a path, sorted by name; `key` is what a person set to it.

    Raises:
      InputError: nothing is there.
    """
    if not path:
        raise InputError(
            "data.path is empty; set it (or the path in data.mixture or data.validation) to a file, folder or glob."
        )
    if path.startswith(TFDS):
        source = _tfds(path, config)
    elif remote.is_remote(path):
        source = _remote(path, key)
    elif path == STDLIB:
        source = Source(path, tuple(_walk(sysconfig.get_paths()["stdlib"], stdlib=True)))
    elif os.path.isdir(path):
        source = Source(path, tuple(_walk(path)))
    elif os.path.exists(path):
        source = Source(path, (_item(path, os.path.basename(path)),), single=True)
    elif glob.has_magic(path):
        source = Source(path, tuple(_glob(path, key)))
    else:
        raise InputError(f"{path} does not exist; set {key} to a file, folder or glob.")
    if not source.items:
        raise InputError(f"{path} holds no files; set {key} to text, JSON lines or Parquet.")
    return source


def _item(file: str, name: str) -> Item:
    with records.storage(file):
        s = os.stat(file)
    return Item(name, os.path.abspath(file), records.kind_of(file), s.st_size, s.st_mtime_ns)


def _walk(top: str, stdlib: bool = False) -> Iterator[Item]:
    """Yield the files under a folder, hidden ones left out; of the standard library only its own sources."""

    def unreadable(e: OSError) -> None:
        raise StorageError(f"{e.filename} cannot be read: {e.strerror}.") from e

    for folder, folders, files in os.walk(top, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not (f.startswith(".") or (stdlib and f in NOT_STDLIB)))
        for file in sorted(files):
            path = os.path.join(folder, file)
            wanted = file.endswith(".py") and not os.path.islink(path) if stdlib else not file.startswith(".")
            if wanted and stat.S_ISREG(os.stat(path).st_mode if os.path.exists(path) else 0):
                yield _item(path, os.path.relpath(path, top).replace(os.sep, "/"))


def _glob(pattern: str, key: str) -> Iterator[Item]:
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    if not files:
        raise InputError(f"{pattern} matches no file; change {key}.")
    top = (
        os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath([os.path.dirname(f) or "." for f in files])
    )
    for file in files:
        yield _item(file, os.path.relpath(file, top or ".").replace(os.sep, "/"))


def _remote(path: str, key: str) -> Source:
    """Find remote files, with the names and in the order that they would have on a disk."""
    pattern, single = glob.has_magic(path), False
    path = path.rstrip("/")
    if pattern:
        found = remote.glob(path)
    else:
        found, single = remote.find(path)
    if pattern and not found:
        raise InputError(f"{path} matches no file; change {key}.")
    protocol = path.partition("://")[0] + "://"
    folders = [os.path.dirname(o.address).removeprefix(protocol) for o in found]
    top = protocol + (os.path.commonpath(folders) if pattern or single else path.removeprefix(protocol)) + "/"
    named = [(o.address.removeprefix(top), o) for o in found]
    items = [Item(name, o.address, records.kind_of(name), o.size, o.version) for name, o in named]
    if not single:
        items = [item for item in items if not any(part.startswith(".") for part in item.name.split("/"))]
    return Source(path, tuple(items if pattern else sorted(items, key=_place)), single)


def _place(item: Item) -> list[tuple[bool, str]]:
    """Return what sorts files as a walk meets them: those of a folder before its folders."""
    *folders, file = item.name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def _tfds(path: str, config: DataConfig) -> Source:
    """Take the split that the path names, or `train` with `validation` or `test` held out."""
    builder, place, version = tfds.open_builder(path, config)
    have = list(builder.info.splits)
    parts = path.split(":")
    split = parts[2] if len(parts) > 2 else "train" if "train" in have else have[0]
    if split not in have:
        raise InputError(f"{path} asks for the split {split!r}; the data set has {', '.join(have)}.")
    items = {s: Item(s, f"{place}/{s}", "tfds", builder.info.splits[s].num_examples, version) for s in have}
    spare = [s for s in ("validation", "test") if s in have and s != split] if len(parts) == 2 else []
    return Source(path, (items[split],), held_out=tuple(items[s] for s in spare[:1]))


def hold_out(source: Source, fraction: float) -> Source:
    """Move a share of the files, chosen by a hash of their names, to `held_out`; at least one stays on each side.

    Only where files are documents: one file, and files of records, are divided by characters and documents (`prepare`).
    """
    if source.held_out or not fraction or not by_file(source):
        return source if fraction else replace(source, held_out=())
    ranked = sorted(source.items, key=_name_hash)
    count = sum(_name_hash(item) < fraction for item in ranked)
    chosen = set(ranked[: min(max(count, 1), len(ranked) - 1)])
    items = tuple(i for i in source.items if i not in chosen)
    return replace(source, items=items, held_out=tuple(i for i in source.items if i in chosen))


def by_file(source: Source) -> bool:
    """Return whether the source is divided into training and validation text by whole files."""
    return len(source.items) > 1 and any(item.kind == "text" for item in source.items)


def _name_hash(item: Item) -> float:
    return int.from_bytes(hashlib.sha256(item.name.encode()).digest()[:8], "big") / 2**64


def read_items(source: Source, items: Iterable[Item], config: DataConfig) -> Iterator[Document]:
    """Yield (name, bytes) of every document that is not empty."""
    for item, text in _begun(items):
        if item.kind == "tfds":
            found = tfds.read_split(source.path, item.name, config)
        elif item.kind == "jsonl":
            found = records.read_jsonl(item.file, item.name, config.text_key)
        elif item.kind == "parquet":
            found = records.read_parquet(item.file, item.name, config.text_key)
        else:
            found = _read_text(source, item, config, text)
        yield from ((name, text) for name, text in found if text)


def _begun(items: Iterable[Item]) -> Iterator[tuple[Item, Callable[[], bytes]]]:
    """Yield items with a call for their bytes; small remote ones are fetched before their turn, side by side."""
    ahead: deque[tuple[Item, Callable[[], bytes]]] = deque()
    with ThreadPoolExecutor(AHEAD // 4) as pool:  # starts its threads with the first task
        try:
            for item in items:
                read = partial(records.read_bytes, item.file)
                small = item.kind == "text" and item.size <= SMALL and remote.is_remote(item.file)
                ahead.append((item, pool.submit(read).result if small else read))
                if len(ahead) > AHEAD:
                    yield ahead.popleft()
            yield from ahead
        finally:
            pool.shutdown(cancel_futures=True)


def _read_text(source: Source, item: Item, config: DataConfig, read: Callable[[], bytes]) -> Iterator[Document]:
    """Yield a text file; one among many that is not UTF-8 is skipped and remembered."""
    text = read()
    if not (source.single and config.tokenizer == "bytes"):
        try:
            text.decode()
        except UnicodeDecodeError as e:
            if source.single:
                raise InputError(
                    f"{item.file} is not UTF-8 at byte {e.start}; convert it, or use data.tokenizer=bytes."
                ) from e
            if item.name not in source.skipped:
                source.skipped.append(item.name)
            return
    yield item.name, text


def documents(path: str, config: DataConfig) -> Iterator[Document]:
    """Yield (name, bytes) of the documents behind a path, held-out ones last."""
    source = find_source(path, config)
    yield from read_items(source, (*source.items, *source.held_out), config)
