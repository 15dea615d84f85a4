"""Tokenise a source into a prepared folder, once: in order, resumable shard by shard, in processes if asked."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aether.config import DataConfig
from aether.data import prepared as folders
from aether.data.prepared import Prepared
from aether.data.records import COMPRESSED, Document
from aether.data.sources import Source, by_file, find_source, hold_out, read_items
from aether.data.tokenizers import Tokenizer, restore_tokenizer, save_tokenizer, split_text
from aether.errors import InputError, StorageError

SHARD_TOKENS = 1 << 26
TASK_BYTES = 1 << 20
Task = list[bytes]


def prepare(source: Source, config: DataConfig, tokenizer: Tokenizer, out: str, workers: int = 0,
            shard_tokens: int = SHARD_TOKENS, progress: bool = True, fraction: float | None = None) -> Prepared:  # fmt: skip
    """Tokenise a source into the folder `out`; go on where a killed run stopped; do nothing if it is finished.

    Args:
      workers: processes that tokenise (0: this one).
      fraction: share held out as the split `validation`; `data.validation_fraction` if None.

    Raises:
      InputError: the source holds no text, or `out` holds another preparation.
    """
    fraction = config.validation_fraction if fraction is None else fraction
    plan = plan_of(source, config, tokenizer, fraction) | dict(shard_tokens=shard_tokens)
    done = folders.read_json(os.path.join(out, folders.PLAN))
    if done is not None and done != plan:
        differ = ", ".join(sorted(k for k in plan if done.get(k) != plan[k]))
        raise InputError(
            f"{out} holds another preparation (differing in {differ}); give another folder, or remove this one."
        )
    if done is None and os.path.isdir(out) and os.listdir(out):
        raise InputError(f"{out} is not empty and not a prepared folder; give another folder.")
    if done is not None and os.path.exists(os.path.join(out, folders.MANIFEST)):
        return folders.open_prepared(out)
    source = hold_out(source, fraction)
    save_tokenizer(tokenizer, os.path.join(out, folders.TOKENIZER))
    folders.write_json(os.path.join(out, folders.PLAN), plan)
    texts = Texts(source, config, fraction)
    shards = _write_shards(texts, tokenizer, out, workers, shard_tokens, progress)
    if not shards:
        raise InputError(f"{source.path} holds no text; set data.path to a file, folder or glob with some.")
    splits = _splits(texts, shards, out, fraction)
    about = dict(source=source.path, skipped=source.skipped, options=plan["options"])
    return folders.write_manifest(out, tokenizer, shards, splits, about)


def plan_of(source: Source, config: DataConfig, tokenizer: Tokenizer, fraction: float) -> dict[str, Any]:
    """Return what decides the contents of a prepared folder."""
    return dict(
        format=folders.FORMAT,
        version=folders.VERSION,
        source=source.path,
        files=files_hash(source),
        tokenizer=tokenizer.hash,
        options=dict(validation_fraction=fraction, text_key=config.text_key),
    )


def files_hash(source: Source) -> str:
    """Return a digest of names, sizes and times of change of a source's files."""
    items = [(i.name, i.file, i.size, i.mtime) for i in (*source.items, *source.held_out)]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


@dataclass
class Texts:
    """The documents of a source in the order of the shards: training text first; counts those passed."""

    source: Source
    config: DataConfig
    fraction: float
    train: int | None = None
    count: int = 0
    pending: list[bytes] = field(default_factory=list)

    def __iter__(self) -> Iterator[bytes]:
        if (
            len(self.source.items) == 1
            and self.source.items[0].kind == "text"
            and self.fraction
            and not self.source.held_out
        ):
            yield from self._divided()
            return
        for _, text in read_items(self.source, self.source.items, self.config):
            self.count += 1
            yield text
        if self.source.held_out or by_file(self.source) or not self.fraction:
            self.train = self.count
        for _, text in read_items(self.source, self.source.held_out, self.config):
            self.count += 1
            yield text

    def _divided(self) -> Iterator[bytes]:
        """Yield the first part and the last part of one text, cut by characters (by bytes for bytes)."""
        for _, text in read_items(self.source, self.source.items, self.config):
            whole = text if self.config.tokenizer == "bytes" else text.decode()
            cut = int(len(whole) * (1 - self.fraction))
            parts = [p if isinstance(p, bytes) else p.encode() for p in (whole[:cut], whole[cut:])]
            self.train = int(bool(parts[0]))
            for part in filter(None, parts):
                self.count += 1
                yield part

    def train_documents(self) -> int:
        """Return how many documents are training text, once all have passed."""
        if self.train is not None:
            return self.train
        if self.count < 2:
            raise InputError(
                f"{self.source.path} has one document, so none can be held out; "
                "set data.validation_fraction to 0 or name a text in data.validation."
            )
        return min(max(int(self.count * (1 - self.fraction)), 1), self.count - 1)


def _write_shards(texts: Texts, tokenizer: Tokenizer, out: str, workers: int, size: int, progress: bool) -> list[dict]:
    """Write the shards that are not there yet, and return the records of all."""
    from tqdm import tqdm

    shards = _finished(out)
    skip = sum(s["documents"] for s in shards)
    plain = not any(i.kind in ("tfds", "parquet") or i.file.endswith(COMPRESSED) for i in texts.source.items)
    total = sum(i.size for i in (*texts.source.items, *texts.source.held_out)) if plain else None
    bar = tqdm(
        total=total, unit="B", unit_scale=True, delay=1, desc=f"preparing {texts.source.path}", disable=not progress
    )
    with bar:
        ids: list[np.ndarray] = []
        starts, length, n_bytes = [], 0, 0
        for text_bytes, tokens in _tokenised(_skipped(texts, skip, bar.update), tokenizer, out, workers):
            starts.append(length)
            ids.extend(tokens)
            length += sum(map(len, tokens))
            n_bytes += text_bytes
            bar.update(text_bytes)
            if length >= size:
                shards.append(_write_shard(out, len(shards), tokenizer, ids, starts, n_bytes))
                ids, starts, length, n_bytes = [], [], 0, 0
        if starts:
            shards.append(_write_shard(out, len(shards), tokenizer, ids, starts, n_bytes))
    return shards


def _skipped(texts: Iterable[bytes], count: int, update: Callable[[int], Any]) -> Iterator[bytes]:
    """Leave out the documents of finished shards."""
    for number, text in enumerate(texts):
        if number < count:
            update(len(text))
        else:
            yield text


def _finished(out: str) -> list[dict]:
    shards: list[dict] = []
    while (record := folders.read_json(os.path.join(out, f"shard-{len(shards):05d}.json"))) is not None:
        shards.append(record)
    return shards


def _write_shard(
    out: str, number: int, tokenizer: Tokenizer, ids: list[np.ndarray], starts: list[int], n_bytes: int
) -> dict:
    """Write the arrays of a shard, then its record, which makes it finished."""
    tokens = np.concatenate(ids).astype(folders.dtype_for(tokenizer.vocab_size), copy=False)
    documents = np.array(starts, np.int64)
    folders.write_atomic(folders.shard_file(out, "tokens", number), tokens)
    folders.write_atomic(folders.shard_file(out, "documents", number), documents)
    digest = hashlib.sha256(tokens.data)
    digest.update(documents.data)
    record = dict(
        tokens=len(tokens), documents=len(starts), bytes=n_bytes, max_id=int(tokens.max()), sha256=digest.hexdigest()
    )
    folders.write_json(os.path.join(out, f"shard-{number:05d}.json"), record)
    return record


def _splits(texts: Texts, shards: list[dict], out: str, fraction: float) -> dict[str, Any]:
    """Return the range of tokens of each split over all shards."""
    cut, total = texts.train_documents(), sum(s["documents"] for s in shards)
    tokens = sum(s["tokens"] for s in shards)
    at = _token_of_document(cut, shards, out)
    splits = dict(train=dict(tokens=[0, at], documents=cut))
    if fraction:
        splits["validation"] = dict(tokens=[at, tokens], documents=total - cut)
    return splits


def _token_of_document(document: int, shards: list[dict], out: str) -> int:
    tokens = 0
    for number, shard in enumerate(shards):
        if document < shard["documents"]:
            return tokens + int(np.load(folders.shard_file(out, "documents", number), mmap_mode="r")[document])
        document, tokens = document - shard["documents"], tokens + shard["tokens"]
    return tokens


def _tokenised(
    texts: Iterable[bytes], tokenizer: Tokenizer, out: str, workers: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (bytes of text, [eot, ids ...]) of each document, in order."""
    dtype = folders.dtype_for(tokenizer.vocab_size)
    eot = np.array([tokenizer.eot], dtype)
    if not workers:
        for text in texts:
            yield len(text), [eot, tokenizer.encode(text).astype(dtype)]
        return
    sizes: deque[tuple[int, int]] = deque()  # (bytes, pieces) of the documents under way
    parts: list[np.ndarray] = []
    for result in _in_processes(_tasks(texts, tokenizer, sizes), os.path.join(out, folders.TOKENIZER), workers):
        parts += result
        while sizes and len(parts) >= sizes[0][1]:
            n_bytes, count = sizes.popleft()
            yield n_bytes, [eot, *(p.astype(dtype, copy=False) for p in parts[:count])]
            parts = parts[count:]


def _tasks(texts: Iterable[bytes], tokenizer: Tokenizer, sizes: deque) -> Iterator[Task]:
    """Group the pieces of documents into tasks of about a megabyte."""
    task: Task = []
    filled = 0
    for text in texts:
        pieces = [text] if tokenizer.any_bytes else [p.encode() for p in split_text(text.decode())]
        sizes.append((len(text), len(pieces)))
        for piece in pieces:
            task.append(piece)
            filled += len(piece)
            if filled >= TASK_BYTES:
                yield task
                task, filled = [], 0
    if task:
        yield task


def _in_processes(tasks: Iterable[Task], tokenizer_folder: str, workers: int) -> Iterator[list[np.ndarray]]:
    """Encode tasks in a pool, in order, with a few under way for each process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of whoever imported JAX
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer_folder,)) as pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_encode_task, task))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise StorageError(
                "a process that tokenises died, perhaps for lack of memory; run again with fewer workers."
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_folder: str) -> None:
    """Load the tokenizer, and end this process when its parent is killed."""
    import multiprocessing
    import threading

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    global _worker_tokenizer
    threading.Thread(target=follow, daemon=True).start()
    _worker_tokenizer = restore_tokenizer(tokenizer_folder)


def _encode_task(task: Task) -> list[np.ndarray]:
    dtype = folders.dtype_for(_worker_tokenizer.vocab_size)
    return [_worker_tokenizer.encode(piece).astype(dtype) for piece in task]


def cache_folder(config: DataConfig) -> str:
    """Return where prepared corpora are kept."""
    return os.path.expanduser(config.cache_dir or os.environ.get("AETHER_CACHE") or "~/.cache/aether")


def prepare_cached(
    source: Source, config: DataConfig, tokenizer: Tokenizer, fraction: float, workers: int = 0
) -> Prepared:
    """Return the prepared folder of a source from the cache, made first if it is not there."""
    plan = plan_of(source, config, tokenizer, fraction)
    key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:24]
    return prepare(
        source, config, tokenizer, os.path.join(cache_folder(config), "text", key), workers, fraction=fraction
    )


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
