"""Corpora prepared on the fly, kept by what decides their contents."""

import glob
import os
from collections.abc import Iterable

import numpy as np

from aether import remote
from aether.config import DataConfig
from aether.data import files, prepared
from aether.data.files import Log, cache_folder, key_of
from aether.data.prepare import discard, files_hash, plan_of, prepare
from aether.data.prepared import Prepared
from aether.data.records import Document
from aether.data.sources import KEYS, Source, find_source, read_items
from aether.data.tokenizers import Tokenizer
from aether.errors import InputError

WORTH_A_POOL = 16 << 20  # bytes of text


def prepare_cached(source: Source, config: DataConfig, tokenizer: Tokenizer, log: Log = lambda line: None) -> Prepared:
    """Return the prepared folder of a source from the cache, made first if it is missing or damaged."""
    folder = os.path.join(cache_folder(config), "text", key_of(plan_of(source, config, tokenizer)))
    if os.path.exists(os.path.join(folder, prepared.MANIFEST)):
        try:
            return prepared.open_prepared(folder)
        except InputError:
            discard(folder, lambda e: log(f"preparing {source.path} again, because {e}"))
    return prepare(source, config, tokenizer, folder, worth_workers(source, tokenizer), log=log)


def worth_workers(source: Source, tokenizer: Tokenizer) -> int:
    """Return how many processes are worth their start: none for little text or where encoding is a table look-up."""
    size = sum(item.size for item in (*source.items, *source.held_out))
    if tokenizer.kind in ("bytes", "chars") or size < WORTH_A_POOL:
        return 0
    return min(os.cpu_count() or 1, 16)


def characters_of(source: Source, config: DataConfig) -> str:
    """Return the sorted characters of a source's texts, remembered in the cache."""
    key = key_of([files_hash(source), config.text_key])
    path = os.path.join(cache_folder(config), "characters", f"{key}.json")
    record = files.read_json(path)
    if record is not None:
        return record["characters"]
    seen = np.zeros(0x110000, bool)
    texts: Iterable[Document] = read_items(source, (*source.items, *source.held_out), config)
    for _, text in texts:
        seen[np.frombuffer(text.decode().encode("utf-32-le"), np.uint32)] = True
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if not characters:
        raise InputError(f"{source.path} holds no text; set data.path to a file, folder or glob with some.")
    files.write_json(path, dict(characters=characters))
    return characters


def find(path: str, config: DataConfig, key: str = KEYS) -> Source | Prepared:
    """Return the prepared folder at a path, or the source of texts; `key` is what a person set to it."""
    pattern = remote.is_remote(path) and glob.has_magic(path)
    if not pattern and prepared.is_prepared(path):
        return prepared.open_prepared(path, cache_folder(config))
    return find_source(path, config, key)
