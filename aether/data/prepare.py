"""Tokenise a source into a prepared folder, once: in order, resumable shard by shard, in processes if asked."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from aether.config import DataConfig
from aether.data import prepared as folders
from aether.data.encode import encode_all
from aether.data.prepared import Prepared
from aether.data.records import COMPRESSED
from aether.data.sources import Source, hold_out
from aether.data.texts import Texts
from aether.data.tokenizers import Tokenizer, save_tokenizer
from aether.errors import InputError, StorageError

SHARD_TOKENS = 1 << 26


def prepare(
    source: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    out: str,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
) -> Prepared:
    """Tokenise a source into the folder `out`, the share `data.validation_fraction` of it as the split `validation`.

    Goes on where a killed run stopped, and does nothing if the folder is finished.

    Args:
      workers: processes that tokenise (0: this one).

    Raises:
      InputError: the source holds no text, or `out` holds something else.
    """
    plan = plan_of(source, config, tokenizer) | dict(shard_tokens=shard_tokens)
    if _is_finished(out, plan):
        return folders.open_prepared(out)
    with _alone(out):
        if _is_finished(out, plan):  # by the process that held the lock
            return folders.open_prepared(out)
        _remove_temporary(out)
        folders.write_json(os.path.join(out, folders.PLAN), plan)
        save_tokenizer(tokenizer, os.path.join(out, folders.TOKENIZER))
        source = hold_out(source, config.validation_fraction)
        texts = Texts(source, config)
        shards = _write_shards(texts, tokenizer, out, workers, shard_tokens, progress)
        if not shards:
            raise InputError(f"{source.path} holds no text; set data.path to a file, folder or glob with some.")
        splits = _splits(texts, shards, out)
        about = dict(source=source.path, skipped=source.skipped, options=plan["options"])
        return folders.write_manifest(out, tokenizer, shards, splits, about)


def _is_finished(out: str, plan: dict[str, Any]) -> bool:
    """Return whether `out` holds this preparation to its end; raise `InputError` if it holds something else."""
    done = folders.read_json(os.path.join(out, folders.PLAN))
    if done is not None and done != plan:
        differ = ", ".join(f"{k} {done.get(k)!r} and now {plan[k]!r}" for k in sorted(plan) if done.get(k) != plan[k])
        raise InputError(f"{out} holds another preparation ({differ}); give another folder, or remove this one.")
    if done is None and os.path.isdir(out) and not all(f == "lock" or ".tmp" in f for f in os.listdir(out)):
        raise InputError(f"{out} is not empty and not a prepared folder; give another folder.")
    return done is not None and os.path.exists(os.path.join(out, folders.MANIFEST))


@contextlib.contextmanager
def _alone(out: str) -> Iterator[None]:
    """Hold the folder's lock, so that runs started together prepare a corpus once."""
    try:
        os.makedirs(out, exist_ok=True)
        lock = open(os.path.join(out, "lock"), "wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except FileExistsError as e:
        raise InputError(f"{out} is a file; give a folder to prepare into.") from e
    except OSError as e:
        raise StorageError(f"{out} cannot be written: {e.strerror}; give another folder (data.cache_dir).") from e
    with lock:
        yield


def _remove_temporary(out: str) -> None:
    """Remove the files that a killed run left half written."""
    for file in os.listdir(out):
        if ".tmp" in file:
            os.remove(os.path.join(out, file))


def plan_of(source: Source, config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what decides the contents of a prepared folder."""
    return dict(
        format=folders.FORMAT,
        version=folders.VERSION,
        source=source.path,
        files=files_hash(source),
        tokenizer=tokenizer.hash,
        options=dict(validation_fraction=config.validation_fraction, text_key=config.text_key),
    )


def files_hash(source: Source) -> str:
    """Return a digest of names, sizes and times of change of a source's files."""
    items = [(i.name, i.file, i.size, i.mtime) for i in (*source.items, *source.held_out)]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def _write_shards(texts: Texts, tokenizer: Tokenizer, out: str, workers: int, size: int, progress: bool) -> list[dict]:
    """Write the shards that are not there yet, and return the records of all."""
    shards = _finished(out)
    done = sum(s["documents"] for s in shards)
    shard = _Shard()
    with _bar(texts.source, progress) as bar:
        try:
            for n_bytes, ids in encode_all(_skipped(texts, done, bar.update), tokenizer, out, workers):
                shard.add(n_bytes, ids)
                bar.update(n_bytes)
                if shard.length >= size:
                    shards.append(shard.write(out, len(shards)))
                    shard = _Shard()
        except InputError as e:
            raise InputError(f"{texts.source.path}: {e}") from e if texts.source.path not in str(e) else e
    if shard.length:
        shards.append(shard.write(out, len(shards)))
    return shards


def _bar(source: Source, progress: bool) -> Any:
    """Make the progress bar, over bytes of text, which are known beforehand only of plain files."""
    from tqdm import tqdm

    items = (*source.items, *source.held_out)
    plain = not any(i.kind in ("tfds", "parquet") or i.file.endswith(COMPRESSED) for i in items)
    total = sum(i.size for i in items) if plain else None
    about = f"preparing {source.path}"
    return tqdm(total=total, unit="B", unit_scale=True, delay=1, desc=about, disable=not progress)


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


class _Shard:
    """The documents of a shard, until it is full."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.starts: list[int] = []
        self.length = self.bytes = 0

    def add(self, n_bytes: int, ids: list[np.ndarray]) -> None:
        """Append a document, given as pieces of ids."""
        self.starts.append(self.length)
        self.ids += ids
        self.length += sum(map(len, ids))
        self.bytes += n_bytes

    def write(self, out: str, number: int) -> dict[str, Any]:
        """Write the arrays, then the record, which makes the shard finished; return the record."""
        tokens, documents = np.concatenate(self.ids), np.array(self.starts, np.int64)
        folders.write_atomic(folders.shard_file(out, "tokens", number), tokens)
        folders.write_atomic(folders.shard_file(out, "documents", number), documents)
        digest = hashlib.sha256(tokens.data)
        digest.update(documents.data)
        record: dict[str, Any] = dict(tokens=self.length, documents=len(self.starts), bytes=self.bytes)
        record |= dict(max_id=int(tokens.max()), sha256=digest.hexdigest())
        folders.write_json(os.path.join(out, f"shard-{number:05d}.json"), record)
        return record


def _splits(texts: Texts, shards: list[dict], out: str) -> dict[str, Any]:
    """Return the range of tokens of each split over all shards."""
    cut, total = texts.train_documents(), sum(s["documents"] for s in shards)
    tokens = sum(s["tokens"] for s in shards)
    at = _token_of_document(cut, shards, out)
    splits = dict(train=dict(tokens=[0, at], documents=cut))
    if texts.fraction:
        splits["validation"] = dict(tokens=[at, tokens], documents=total - cut)
    return splits


def _token_of_document(document: int, shards: list[dict], out: str) -> int:
    tokens = 0
    for number, shard in enumerate(shards):
        if document < shard["documents"]:
            return tokens + int(np.load(folders.shard_file(out, "documents", number), mmap_mode="r")[document])
        document, tokens = document - shard["documents"], tokens + shard["tokens"]
    return tokens
