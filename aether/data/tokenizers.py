"""Tokenizers: bytes, characters, SentencePiece, GPT-2's BPE. Each token has its bytes, so decoding is a lookup."""

import abc
import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from aether.data import files
from aether.errors import InputError

EOT = "<|endoftext|>"
SPACE_MARK = "\u2581"  # how SentencePiece writes a space
PIECE = 1 << 18  # characters encoded at a time
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Neither GPT-2's pieces nor SentencePiece's reach from a printing character over a space: a cut there changes nothing.
_CUT = re.compile(r"[^\s\x1c-\x1f](?= )")


def split_text(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a long text before spaces into pieces of `size` characters or a little more."""
    begin = 0
    while begin < len(text):
        found = _CUT.search(text, begin + size - 1) if len(text) - begin > size else None
        end = found.end() if found else len(text)
        yield text[begin:end]
        begin = end


class Tokenizer(abc.ABC):
    """Maps text to ids and back.

    Attributes:
      spec: what `data.tokenizer` said.
      eot: id of the end-of-text token, with which every document begins.
      pieces: the bytes of each id; empty for `eot`.
    """

    kind = ""
    any_bytes = False

    def __init__(self, spec: str, pieces: Sequence[bytes], eot: int, files: Mapping[str, bytes]):
        self.spec, self.pieces, self.eot, self.files = spec, list(pieces), eot, dict(files)

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, end of text included."""
        return len(self.pieces)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Return the bytes of text that each id stands for, int32 (vocab_size,)."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def hash(self) -> str:
        """Return a digest of all that decides the ids."""
        digest = hashlib.sha256(f"{self.kind} {self.eot} {self.vocab_size}".encode())
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name])
        return digest.hexdigest()

    @abc.abstractmethod
    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of a text, int32, without end of text.

        Raises:
          InputError: the text is not UTF-8, or has a character that the tokenizer does not know.
        """

    def decode(self, ids: Any) -> bytes:
        """Return the bytes that the ids stand for; end of text stands for none."""
        return b"".join(self.pieces[i] for i in np.asarray(ids).reshape(-1).tolist())


class TextTokenizer(Tokenizer):
    """A tokenizer of characters: its text is UTF-8, and is encoded piece by piece."""

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of a text; see `Tokenizer.encode`."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as e:
                raise InputError(
                    f"the text is not UTF-8 at byte {e.start}; convert it, or use data.tokenizer=bytes."
                ) from e
        parts = [np.asarray(self._encode(piece), np.int32) for piece in split_text(text)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    @abc.abstractmethod
    def _encode(self, text: str) -> Any:
        """Return the ids of a piece that `split_text` has cut."""


class Bytes(Tokenizer):
    """An id a byte; takes any bytes, never decoding them."""

    kind, any_bytes = "bytes", True

    def __init__(self) -> None:
        super().__init__("bytes", [bytes([i]) for i in range(256)] + [b""], 256, {})

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the bytes as int32."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)


class Chars(TextTokenizer):
    """An id a character of a given set."""

    kind = "chars"

    def __init__(self, characters: str):
        files = {"characters.json": json.dumps(characters).encode()}
        super().__init__("chars", [c.encode() for c in characters] + [b""], len(characters), files)
        self.characters = characters
        self._codes = np.array([ord(c) for c in characters], np.uint32)

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ids, len(self._codes) - 1)] == codes
        if not known.all():
            unknown = chr(codes[np.argmin(known)])
            raise InputError(
                f"data.tokenizer=chars knows the {len(self.characters)} characters of its training text, "
                f"but not {unknown!r} (U+{ord(unknown):04X}); remove it, or use data.tokenizer=bytes."
            )
        return ids


class SentencePiece(TextTokenizer):
    """A SentencePiece model; its end-of-sentence (or begin-of-sentence, or else one more) id is end of text."""

    kind = "sentencepiece"

    def __init__(self, spec: str, model: bytes):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise InputError(f"{spec} is not a SentencePiece model; give a .model file as data.tokenizer.") from e
        pieces = [self._piece(i) for i in range(self._model.vocab_size())]
        eot = next((i for i in (self._model.eos_id(), self._model.bos_id()) if i >= 0), len(pieces))
        spelled = {pieces[i]: i for i in range(len(pieces)) if self._model.is_byte(i)}
        self._mark = [spelled[bytes([b])] for b in SPACE_MARK.encode()] if spelled else self._model.encode(SPACE_MARK)
        super().__init__(spec, pieces + [b""] * (eot == len(pieces)), eot, {"tokenizer.model": model})

    def _piece(self, i: int) -> bytes:
        name = self._model.id_to_piece(i)
        if self._model.is_byte(i):
            return bytes([int(name[3:5], 16)])  # "<0x41>"
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        return name.replace(SPACE_MARK, " ").encode()

    def _encode(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE_MARK)
        ids = self._model.encode(first)
        for part in rest:  # the model takes this character for a space: spell it in bytes
            ids += self._mark + self._model.encode(part)
        return ids


class GPT2(TextTokenizer):
    """Byte-pair encoding with GPT-2's pattern; an id is also the rank of its merge."""

    kind = "gpt2"

    def __init__(self, spec: str, ranks: Mapping[bytes, int]):
        try:
            import tiktoken
        except ImportError as e:
            raise InputError(f'data.tokenizer={spec} needs the package tiktoken: pip install "aether[bpe]".') from e
        pieces = sorted(ranks, key=ranks.__getitem__)
        if [ranks[p] for p in pieces] != list(range(len(pieces))):
            raise InputError(f"data.tokenizer={spec} has ids with gaps; give the files as OpenAI published them.")
        table = b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces))
        super().__init__(spec, [*pieces, b""], len(pieces), {"tokenizer.tiktoken": table})
        special = {EOT: len(pieces)}
        self._model = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=dict(ranks), special_tokens=special
        )

    def _encode(self, text: str) -> list[int]:
        return self._model.encode_ordinary(text)


def chars_tokenizer(characters: str) -> Chars:
    """Make the tokenizer of a set of characters, whose ids follow their code points."""
    return Chars("".join(sorted(set(characters))))


def load_tokenizer(spec: str) -> Tokenizer:
    """Load `bytes`, a SentencePiece `.model` file or `gpt2:FOLDER`; `chars` is made from its corpus instead."""
    if spec == "bytes":
        return Bytes()
    if spec.startswith("gpt2:"):
        return GPT2(spec, _gpt2_ranks(spec.removeprefix("gpt2:")))
    if spec.endswith(".model"):
        return SentencePiece(spec, _read(spec))
    raise InputError(f"data.tokenizer is {spec!r}; it takes bytes, chars, a SentencePiece .model file, or gpt2:FOLDER.")


def _read(path: str) -> bytes:
    content = files.read(path)
    if content is None:
        raise InputError(f"data.tokenizer names the file {path}, which does not exist.")
    return content


def _gpt2_ranks(folder: str) -> dict[bytes, int]:
    """Read the table of ids from `r50k_base.tiktoken`, or from `encoder.json` with `vocab.bpe`."""
    table, encoder, merges = "r50k_base.tiktoken", "encoder.json", "vocab.bpe"
    have = files.sizes(folder)
    if table not in have and not (encoder in have and merges in have):
        raise InputError(
            f"data.tokenizer=gpt2:{folder} finds neither r50k_base.tiktoken nor encoder.json with vocab.bpe there."
        )
    found = {name: _read(os.path.join(folder, name)) for name in (table, encoder, merges) if name in have}
    try:
        return _parse_table(found[table]) if table in found else _parse_encoder(found[encoder], found[merges])
    except (ValueError, KeyError, IndexError) as e:
        raise InputError(f"data.tokenizer=gpt2:{folder} has damaged files ({e}); fetch them again.") from e


def _parse_table(table: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in table.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _parse_encoder(encoder: bytes, merges: bytes) -> dict[bytes, int]:
    """Turn GPT-2's printable stand-ins back into bytes, and check that ids follow the order of the merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {chr(b): b for b in printable}
    stand_in |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    ids = json.loads(encoder)
    pairs = [line.split(" ") for line in merges.decode().splitlines() if line and not line.startswith("#version")]
    if any(ids[a + b] != 256 + i for i, (a, b) in enumerate(pairs)):
        raise ValueError("encoder.json does not number the merges of vocab.bpe in their order")
    return {bytes(stand_in[c] for c in token): i for token, i in ids.items() if token != EOT}


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write all that `restore_tokenizer` needs into a folder."""
    record = dict(kind=tokenizer.kind, spec=tokenizer.spec, vocab_size=tokenizer.vocab_size, hash=tokenizer.hash)
    parts = {**tokenizer.files, "tokenizer.json": json.dumps(record, indent=2).encode() + b"\n"}
    for name, content in parts.items():
        files.write(os.path.join(folder, name), content)


def restore_tokenizer(folder: str) -> Tokenizer:
    """Read a tokenizer that `save_tokenizer` wrote."""
    try:
        record = json.loads(_read(os.path.join(folder, "tokenizer.json")))
        kind, spec = record["kind"], record["spec"]
        made: Tokenizer
        if kind == "bytes":
            made = Bytes()
        elif kind == "chars":
            made = Chars(json.loads(_read(os.path.join(folder, "characters.json"))))
        elif kind == "sentencepiece":
            made = SentencePiece(spec, _read(os.path.join(folder, "tokenizer.model")))
        else:
            made = GPT2(spec, _parse_table(_read(os.path.join(folder, "tokenizer.tiktoken"))))
        if made.hash != record["hash"]:
            raise ValueError("its files do not give the recorded hash")
    except (ValueError, KeyError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"the tokenizer in {folder} is damaged ({e}); restore the folder from a copy.") from e
    return made
