"""Corpora prepared on the fly, kept by what decides their contents."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable

import numpy as np

from aether.config import DataConfig
from aether.data import prepared as folders
from aether.data.prepare import files_hash, plan_of, prepare
from aether.data.prepared import Prepared
from aether.data.records import Document
from aether.data.sources import Source, find_source, read_items
from aether.data.tokenizers import Tokenizer
from aether.errors import InputError, StorageError

WORTH_A_POOL = 16 << 20  # bytes of text


def cache_folder(config: DataConfig) -> str:
    """Return where prepared corpora are kept."""
    return os.path.expanduser(config.cache_dir or os.environ.get("AETHER_CACHE") or "~/.cache/aether")


def prepare_cached(
    source: Source, config: DataConfig, tokenizer: Tokenizer, log: Callable[[str], None] = lambda line: None
) -> Prepared:
    """Return the prepared folder of a source from the cache, made first if it is missing or damaged."""
    plan = plan_of(source, config, tokenizer)
    key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:24]
    folder = os.path.join(cache_folder(config), "text", key)
    if os.path.exists(os.path.join(folder, folders.MANIFEST)):
        try:
            return folders.open_prepared(folder)
        except InputError as e:
            log(f"preparing {source.path} again, because {e}")
            shutil.rmtree(folder, ignore_errors=True)
    return prepare(source, config, tokenizer, folder, worth_workers(source, tokenizer))


def worth_workers(source: Source, tokenizer: Tokenizer) -> int:
    """Return how many processes are worth their start: none for little text or where encoding is a table look-up."""
    size = sum(item.size for item in (*source.items, *source.held_out))
    if tokenizer.kind in ("bytes", "chars") or size < WORTH_A_POOL:
        return 0
    return min(os.cpu_count() or 1, 16)


def characters_of(source: Source, config: DataConfig) -> str:
    """Return the sorted characters of a source's texts, remembered in the cache."""
    key = hashlib.sha256(f"{files_hash(source)} {config.text_key}".encode()).hexdigest()[:24]
    path = os.path.join(cache_folder(config), "characters", f"{key}.json")
    record = folders.read_json(path)
    if record is not None:
        return record["characters"]
    seen = np.zeros(0x110000, bool)
    texts: Iterable[Document] = read_items(source, (*source.items, *source.held_out), config)
    for _, text in texts:
        seen[np.frombuffer(text.decode().encode("utf-32-le"), np.uint32)] = True
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if not characters:
        raise InputError(f"{source.path} holds no text; set data.path to a file, folder or glob with some.")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as e:
        raise StorageError(
            f"{os.path.dirname(path)} cannot be made: {e.strerror}; set data.cache_dir to another folder."
        ) from e
    folders.write_json(path, dict(characters=characters))
    return characters


def find(path: str, config: DataConfig) -> Source | Prepared:
    """Return the prepared folder at a path, or the source of texts."""
    return folders.open_prepared(path) if folders.is_prepared(path) else find_source(path, config)
