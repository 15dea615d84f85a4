"""Folders of pictures by class: which files there are, and which of them are whole."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from aether.config import DataConfig
from aether.data import files
from aether.data.files import Log, cache_folder, key_of
from aether.data.images import decode
from aether.data.images.stores import Files, Source, read_file
from aether.errors import InputError, StorageError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
HELD_OUT = ("val", "validation", "test")
TINY_IMAGENET = "val_annotations.txt"  # file, tab, class, of the pictures in `images` beside it
BOXES = "_boxes.txt"  # ends the name of another list of Tiny-ImageNet's, beside `images` in each class
CHECK = 1  # changes with what a check looks for
BLOCK = 1024  # files that wait for a thread at one time


@dataclass(frozen=True, slots=True)
class Entry:
    """A file below a class folder, by its path below the root; without a label where a list of labels omits it."""

    name: str
    label: str
    size: int
    mtime_ns: int


def open_folder(root: str, config: DataConfig, strict: bool, log: Log) -> Source:
    """Open ROOT/class/..., or ROOT/train/class/... with ROOT/val (or validation, test)/class/... held out.

    Every picture is decoded once to see whether it is whole, and the result kept in the cache.

    Raises:
      InputError: fewer than two classes, an empty class, classes that are held out only, or with `strict` a bad file.
    """
    split = os.path.isdir(os.path.join(root, "train"))
    parts = ["train", *[p for p in HELD_OUT if os.path.isdir(os.path.join(root, p))][:1]] if split else [""]
    found = {part: list(_entries(root, part)) for part in parts}
    every = [entry for entries in found.values() for entry in entries]
    bad, facts = _checked(root, [entry for entry in every if entry.label], config, log)
    bad |= {entry.name: f"not in {TINY_IMAGENET}" for entry in every if not entry.label}
    if bad and strict:
        name = next(iter(bad))
        raise InputError(
            f"{os.path.join(root, name)} cannot be used ({bad[name]}), one of {len(bad)} such files; mend or remove "
            "it, or set image.strict=False to skip them."
        )
    classes = _classes(root, parts, [[e for e in found[part] if e.name not in bad] for part in parts])
    stores = [_store(root, [e for e in found[part] if e.name not in bad], classes) for part in parts]
    digest = key_of([classes, [[e.name, e.label, e.size] for e in every if e.name not in bad], parts])
    skipped = tuple(f"{name} ({why})" for name, why in bad.items())
    return Source(root, classes, facts, stores[0], stores[1] if len(stores) > 1 else None, digest, skipped)


def _entries(root: str, part: str) -> Iterator[Entry]:
    """Yield the files of all classes in order, hidden ones and Tiny-ImageNet's lists left out."""

    def unreadable(e: OSError) -> None:
        raise StorageError(f"{e.filename} cannot be read: {e.strerror}.") from e

    top = os.path.join(root, part)
    labels = _annotations(top)
    for folder, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        below = os.path.relpath(folder, top).replace(os.sep, "/")
        if below == ".":
            continue
        for name in sorted(n for n in names if not n.startswith(".")):
            if name.endswith(BOXES) and "images" in folders:
                continue
            label = labels.get(name, "") if labels else below.split("/")[0]
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                s = os.stat(path)
                yield Entry("/".join(filter(None, (part, below, name))), label, s.st_size, s.st_mtime_ns)


def _annotations(top: str) -> dict[str, str]:
    """Return file -> class of a folder that says so in a list, as Tiny-ImageNet's held-out pictures do."""
    listed = os.path.join(top, TINY_IMAGENET)
    if not os.path.exists(listed):
        return {}
    lines = read_file(listed).decode().splitlines()
    return {words[0]: words[1] for words in (line.split("\t") for line in lines) if len(words) > 1}


def _classes(root: str, parts: list[str], found: list[list[Entry]]) -> tuple[str, ...]:
    """Return the class folders of the training part, sorted; each must hold pictures."""
    top = os.path.join(root, parts[0])
    classes = tuple(sorted(f.name for f in os.scandir(top) if f.is_dir() and not f.name.startswith(".")))
    if len(classes) < 2:
        raise InputError(
            f"{top} has {len(classes)} class folders{': ' * bool(classes)}{', '.join(classes)}; "
            "data.path takes a folder with one folder of pictures a class, at least two."
        )
    for part, entries in zip(parts, found, strict=True):
        where, have = os.path.join(root, part), {e.label for e in entries}
        if extra := sorted(have - set(classes)):
            raise InputError(f"{where} has the class {extra[0]}, which {top} does not have; make the classes the same.")
        if lacking := [c for c in classes if c not in have and (part == parts[0] or os.path.isdir(f"{where}/{c}"))]:
            raise InputError(f"{os.path.join(where, lacking[0])} holds no picture; fill the folder or remove it.")
    return classes


def _store(root: str, entries: list[Entry], classes: tuple[str, ...]) -> Files:
    numbers = {name: i for i, name in enumerate(classes)}
    return Files(root, tuple(e.name for e in entries), np.array([numbers[e.label] for e in entries], np.int32))


def _checked(
    root: str, entries: list[Entry], config: DataConfig, log: Log
) -> tuple[dict[str, str], tuple[int, int, int]]:
    """Return name -> what is wrong with it, and the shape of the others (0: they differ); from the cache if it can."""
    folder = os.path.join(cache_folder(config), "images")
    listing = [[e.name, e.size, e.mtime_ns] for e in entries]
    file = os.path.join(folder, f"{key_of([CHECK, os.path.abspath(root), listing])}.json")
    record: dict[str, Any] | None = files.read_json(file)
    if record is None:
        with files.alone(os.path.join(folder, "lock"), log):
            record = files.read_json(file) or _check(root, entries)
            files.write_json(file, record)
    height, width, channels = record["shape"]
    return record["bad"], (height, width, channels)


def _check(root: str, entries: list[Entry]) -> dict[str, Any]:
    """Decode every file, side by side; PIL lets threads run while it decodes."""
    from tqdm import tqdm

    def look(entry: Entry) -> tuple[int, int, bool] | str:
        if not entry.name.lower().endswith(ENDINGS):
            return f"not {', '.join(ENDINGS)}"
        try:
            return decode.facts(read_file(os.path.join(root, entry.name)))
        except decode.BROKEN as e:
            return decode.reason(e)

    results: list[tuple[int, int, bool] | str] = []
    bar = tqdm(total=len(entries), delay=1, unit="files", desc=f"checking the pictures of {root}")
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for begin in range(0, len(entries), BLOCK):
            results += pool.map(look, entries[begin : begin + BLOCK])
            bar.update(len(results) - begin)
    bad = {e.name: r for e, r in zip(entries, results, strict=True) if isinstance(r, str)}
    good = [r for r in results if not isinstance(r, str)]
    sides = {r[:2] for r in good}
    width, height = sides.pop() if len(sides) == 1 else (0, 0)
    return dict(bad=bad, shape=[height, width, 1 if good and all(grey for *_, grey in good) else 3])
