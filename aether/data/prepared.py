"""A prepared folder: shards of token ids with document offsets, a tokenizer, and `manifest.json`, written last."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aether.data.files import read_json, sizes, write_json
from aether.data.tokenizers import Tokenizer, restore_tokenizer
from aether.errors import InputError

FORMAT, VERSION = "aether prepared text", 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Prepared:
    """A prepared folder whose manifest was read and whose files were found whole.

    Attributes:
      cache: a local folder for what is read of a remote one.
      sizes: bytes of the files by name.
    """

    folder: str
    manifest: dict[str, Any]
    cache: str = ""
    sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """Return the digest of tokens, tokenizer and splits."""
        return self.manifest["fingerprint"]

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Return the splits by name, each with its `tokens` range, and counts."""
        return self.manifest["splits"]

    def tokenizer(self) -> Tokenizer:
        """Restore the tokenizer that made the tokens."""
        return restore_tokenizer(os.path.join(self.folder, TOKENIZER))


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the smallest type that shards use for so many ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_file(folder: str, what: str, number: int) -> str:
    """Return the path of the `tokens` or `documents` array of a shard."""
    return os.path.join(folder, f"{what}-{number:05d}.npy")


def is_prepared(path: str) -> bool:
    """Return whether a path is a prepared folder, finished or not."""
    records = (read_json(os.path.join(path, name)) for name in (MANIFEST, PLAN))
    return any(record is not None and record.get("format") == FORMAT for record in records)


def open_prepared(folder: str, cache: str = "") -> Prepared:
    """Read the manifest and check that the shards are there with their sizes; contents are trusted.

    Args:
      cache: local folder under which the tokens of a remote folder are kept.

    Raises:
      InputError: unfinished, of another format version, or damaged.
    """
    manifest = read_json(os.path.join(folder, MANIFEST))
    if manifest is None or manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder} was not prepared to its end; run the same tools/prepare_text.py command again to finish it."
        )
    if manifest.get("version") != VERSION:
        have = manifest.get("version")
        raise InputError(f"{folder} has format version {have} and this Aether reads {VERSION}; prepare the text again.")
    try:
        item, have = np.dtype(manifest["dtype"]).itemsize, sizes(folder)
        for number, shard in enumerate(manifest["shards"]):
            _check_size(shard_file(folder, "tokens", number), have, shard["tokens"] * item)
            _check_size(shard_file(folder, "documents", number), have, shard["documents"] * 8)
        top, vocab = max(s["max_id"] for s in manifest["shards"]), manifest["tokenizer"]["vocab_size"]
        _ = manifest["fingerprint"], [s["tokens"][1] for s in manifest["splits"].values()]
    except (KeyError, TypeError, ValueError, IndexError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{folder}/{MANIFEST} is damaged ({e!r}); prepare the text again.") from e
    check_ids(top, vocab, folder)
    return Prepared(folder, manifest, cache and os.path.join(cache, "shards", manifest["fingerprint"]), have)


def _check_size(file: str, have: dict[str, int], payload: int) -> None:
    size = have.get(os.path.basename(file))
    if size is None:
        raise InputError(f"{file} is missing; prepare the text again.")
    if not payload + 64 <= size <= payload + 256:
        raise InputError(
            f"{file} has {size} bytes where its manifest needs about {payload + 128}; prepare the text again."
        )


def check_ids(top: int, vocab: int, where: str) -> None:
    """Raise `InputError` if the largest id is beyond the vocabulary."""
    if top >= vocab:
        raise InputError(
            f"{where} holds a token id beyond the vocabulary: {top}, and the tokenizer has the ids 0 to {vocab - 1}; "
            "prepare the text again with this data.tokenizer."
        )


def check_tokenizer(prepared: Prepared, tokenizer: Tokenizer) -> None:
    """Raise `InputError` if a folder was made with another tokenizer."""
    theirs = prepared.manifest["tokenizer"]
    if theirs["hash"] != tokenizer.hash:
        have = f"{theirs['spec']} ({theirs['vocab_size']} ids, {theirs['hash'][:8]})"
        want = f"{tokenizer.spec} ({tokenizer.vocab_size} ids, {tokenizer.hash[:8]})"
        raise InputError(
            f"{prepared.folder} was prepared with the tokenizer {have} and data.tokenizer is {want}; "
            "set data.tokenizer to that one, or prepare the text again."
        )


def write_manifest(
    folder: str, tokenizer: Tokenizer, shards: Sequence[dict[str, Any]], splits: dict[str, Any], about: dict[str, Any]
) -> Prepared:
    """Write the manifest, which finishes a folder, with a fingerprint of tokens, splits and tokenizer."""
    ranges = {name: split["tokens"] for name, split in splits.items()}
    decides = json.dumps([VERSION, tokenizer.hash, [s["sha256"] for s in shards], ranges], sort_keys=True)
    manifest = dict(
        format=FORMAT,
        version=VERSION,
        fingerprint=hashlib.sha256(decides.encode()).hexdigest()[:32],
        tokenizer=dict(
            spec=tokenizer.spec,
            kind=tokenizer.kind,
            hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            eot=tokenizer.eot,
        ),
        dtype=dtype_for(tokenizer.vocab_size).name,
        splits=splits,
        shards=list(shards),
        **about,
    )
    write_json(os.path.join(folder, MANIFEST), manifest)
    return open_prepared(folder)
