"""Tokenise a source into a prepared folder, once: in order, resumable shard by shard, in processes if asked."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from aether import remote
from aether.config import DataConfig
from aether.data import files
from aether.data import prepared as folders
from aether.data.encode import encode_all
from aether.data.files import Log, cache_folder, key_of
from aether.data.prepared import Prepared
from aether.data.records import COMPRESSED
from aether.data.sources import Source, hold_out
from aether.data.texts import Texts
from aether.data.tokenizers import Tokenizer, save_tokenizer
from aether.errors import InputError

SHARD_TOKENS = 1 << 26
LOCK = "lock"


def prepare(
    source: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    out: str,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    log: Log = lambda line: None,
) -> Prepared:
    """Tokenise a source into the folder `out`, the share `data.validation_fraction` of it as the split `validation`.

    Goes on where a killed run stopped, and does nothing if the folder is finished. A remote folder is written shard
    by shard; in either kind the manifest comes last, without which nothing reads the folder.

    Args:
      workers: processes that tokenise (0: this one).

    Raises:
      InputError: the source holds no text, or `out` holds something else.
    """
    plan = plan_of(source, config, tokenizer) | dict(shard_tokens=shard_tokens)
    if _plan(out) == plan and _is_finished(out):
        return folders.open_prepared(out)
    with files.alone(_lock(out, config), log):
        _check_plan(out, plan)
        if _is_finished(out):  # by the process that held the lock
            return folders.open_prepared(out)
        _remove_temporary(out)
        files.write_json(os.path.join(out, folders.PLAN), plan)
        save_tokenizer(tokenizer, os.path.join(out, folders.TOKENIZER))
        source = hold_out(source, config.validation_fraction)
        texts = Texts(source, config)
        shards = _write_shards(texts, tokenizer, out, workers, shard_tokens, progress)
        if not shards:
            raise InputError(f"{source.path} holds no text; set data.path to a file, folder or glob with some.")
        splits = _splits(texts, shards, out)
        about = dict(source=source.path, skipped=source.skipped, options=plan["options"])
        return folders.write_manifest(out, tokenizer, shards, splits, about)


def _plan(out: str) -> dict[str, Any] | None:
    return files.read_json(os.path.join(out, folders.PLAN))


def _is_finished(out: str) -> bool:
    return files.read_json(os.path.join(out, folders.MANIFEST)) is not None


def _check_plan(out: str, plan: dict[str, Any]) -> None:
    """Raise `InputError` if `out` holds something else than a part of this preparation."""
    done = _plan(out)
    if done is not None and done != plan:
        differ = ", ".join(f"{k} {done.get(k)!r} and now {plan[k]!r}" for k in sorted(plan) if done.get(k) != plan[k])
        raise InputError(f"{out} holds another preparation ({differ}); give another folder, or remove this one.")
    if done is None and not all(f == LOCK or ".tmp" in f for f in _names(out)):
        raise InputError(f"{out} is not empty and not a prepared folder; give another folder.")


def _names(out: str) -> list[str]:
    """List what is in a folder, folders too where it is local."""
    return list(files.sizes(out)) if remote.is_remote(out) else os.listdir(out)


def _lock(out: str, config: DataConfig) -> str:
    """Return the lock of a folder; of a remote one it keeps this machine's processes apart."""
    if not remote.is_remote(out):
        return os.path.join(out, LOCK)
    return os.path.join(cache_folder(config), "locks", key_of(out), LOCK)


def _remove_temporary(out: str) -> None:
    """Remove the files that a killed run left half written."""
    for file in [] if remote.is_remote(out) else os.listdir(out):
        if ".tmp" in file:
            os.remove(os.path.join(out, file))


def discard(out: str, tell: Callable[[InputError], None]) -> None:
    """Empty a local prepared folder that is still damaged when no other process works on it."""
    with files.alone(os.path.join(out, LOCK), lambda line: None):
        try:
            folders.open_prepared(out)
        except InputError as e:
            if not _is_finished(out):  # another process emptied it before
                return
            tell(e)
            # A kill between two of these leaves a part that is taken up, with the plan, or an empty folder.
            order = (folders.MANIFEST, "shard-", "tokens-", "documents-", folders.PLAN)
            for file in sorted(files.sizes(out), key=lambda f: [f.startswith(start) for start in order], reverse=True):
                if file != LOCK:
                    os.remove(os.path.join(out, file))
            shutil.rmtree(os.path.join(out, folders.TOKENIZER), ignore_errors=True)


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
    """Return a digest of names, sizes and versions of a source's files."""
    items = [(i.name, i.file, i.size, i.version) for i in (*source.items, *source.held_out)]
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
    while (record := files.read_json(os.path.join(out, f"shard-{len(shards):05d}.json"))) is not None:
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
        files.write_array(folders.shard_file(out, "tokens", number), tokens)
        files.write_array(folders.shard_file(out, "documents", number), documents)
        digest = hashlib.sha256(tokens.data)
        digest.update(documents.data)
        record: dict[str, Any] = dict(tokens=self.length, documents=len(self.starts), bytes=self.bytes)
        record |= dict(max_id=int(tokens.max()), sha256=digest.hexdigest())
        files.write_json(os.path.join(out, f"shard-{number:05d}.json"), record)
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
            starts = files.read(folders.shard_file(out, "documents", number)) or b""
            return tokens + int(np.load(io.BytesIO(starts))[document])
        document, tokens = document - shard["documents"], tokens + shard["tokens"]
    return tokens
