"""Tokenizers for the `tokenizers` library, whose ids are Aether's own.

Each is checked on texts that are meant to break it and on its own pieces, in their order and at random; one that would
give other ids is left out, with the reason in the card.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from aether.data.tokenizers import EOT, GPT2, SPACE_MARK, Bytes, Chars, SentencePiece, Tokenizer
from aether.errors import InputError
from aether.export.source import NOTES

MASK = "<|mask|>"
TEXTS = (
    "The model reads a line, and says what comes next; it's 3.14159 or 2,718,281 or 1e-9.",
    "  two spaces, then\ttabs\t\t, line\nbreaks\n\n\n and \r\n others   \u00a0 \u2003 \u3000 at the end   ",
    " \n  \n\t x \x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029 y",
    "Übermäßig naïve façade, e\u0301 and é, ﬁne Ⅳ ½ ② ｆｕｌｌ",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, 中文字符, 日本語、한국어, ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 ⵟ ∑∫√ α (x·w + b)² / (‖x − w‖² + ε)",
    f"{EOT} <unk> <s> </s> <pad> [MASK] <0x41> <0x0A> <0xE2> {SPACE_MARK}{SPACE_MARK}a {SPACE_MARK} b{SPACE_MARK}",
    "def f(x):\n    return {'a': [1, 2]}  # don't, can't, I'll, we've, THEY'RE, I'd, 'sx\n\n\n\tpass\n",
    "\u0000\u0001\u007f \ufeff \ufffd \U0010ffff",
    " ".join(c * n for c in "-=._*#~/!a0\n\t" for n in range(1, 65)),
    "x".join(" " * n for n in range(1, 65)),
    "",
)


def write_tokenizer(tokenizer: Tokenizer, facts: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, or why there are none."""
    made = make(tokenizer, mask=not facts["causal"])
    reason = difference(tokenizer, made, (*TEXTS, *_own_words(tokenizer)))
    if reason:
        (folder / NOTES).write_text(f"The tokenizer is not among the files: {reason}\n", encoding="utf-8")
        return
    made.save(str(folder / "tokenizer.json"))
    names = dict(bos_token=EOT, eos_token=EOT, pad_token=EOT)
    if not facts["causal"]:
        names |= dict(mask_token=MASK)
        said = (
            f"In a text, {MASK} and {EOT} are the tokens of these names, and not what Aether makes of the characters.\n"
        )
        (folder / NOTES).write_text(said, encoding="utf-8")
    config = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=facts["context"], **names)
    config |= dict(clean_up_tokenization_spaces=False, split_special_tokens=facts["causal"], padding_side="left")
    config |= dict(model_input_names=["input_ids", "attention_mask"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def difference(ours: Tokenizer, made: Any, texts: Iterable[str]) -> str:
    """Return how two tokenizers differ, or nothing."""
    for text in texts:
        try:
            wanted = ours.encode(text).tolist()
        except InputError:
            wanted = None  # characters that it does not know
        try:
            got = made.encode(text, add_special_tokens=False).ids
        except Exception:  # of the library's own kind, which has no name
            got = None
        if got != wanted:
            return f"of {text[:40]!r} it would make {str(got)[:60]}, and Aether makes {str(wanted)[:60]}."
    return ""


def _own_words(tokenizer: Tokenizer) -> list[str]:
    """Return texts of all pieces that are text, and of pieces drawn at random: what its training text is made of."""
    rng = np.random.default_rng(0)
    orders = [np.arange(tokenizer.vocab_size), *(rng.integers(0, tokenizer.vocab_size, 1000) for _ in range(20))]
    return [tokenizer.decode(ids).decode(errors="ignore") for ids in orders]


def make(tokenizer: Tokenizer, mask: bool = False) -> Any:
    """Return the `tokenizers.Tokenizer` of one of ours; with special tokens, each text begins with end of text."""
    from tokenizers import AddedToken, processors

    parts: dict[type, Any] = {Bytes: _bytes, Chars: _chars, GPT2: _gpt2, SentencePiece: _sentencepiece}
    made = parts[type(tokenizer)](tokenizer)
    eot = tokenizer.eot
    made.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    if mask:
        made.add_tokens([AddedToken(MASK, special=False, normalized=False)])
    made.encode_special_tokens = True
    made.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", pair=f"{EOT} $A {EOT}:1 $B:1", special_tokens=[(EOT, eot)]
    )
    return made


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], words: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab, merges, ignore_merges=words))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    return made


def _bytes(tokenizer: Tokenizer) -> Any:
    return _byte_level({c: b for b, c in enumerate(_stand_ins())}, [], False)


def _gpt2(tokenizer: Tokenizer) -> Any:
    """Merge any two pieces that make a third, those first whose id is lowest; whole words that are pieces stay."""
    letters = _stand_ins()
    names = ["".join(letters[b] for b in piece) for piece in tokenizer.pieces[: tokenizer.eot]]
    vocab = {name: i for i, name in enumerate(names)}
    return _byte_level(vocab, _pairs(names, vocab), True)


def _chars(tokenizer: Tokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {piece.decode(): i for i, piece in enumerate(tokenizer.pieces[: tokenizer.eot])}
    made = Tokenizer(models.WordLevel(vocab, unk_token=EOT + " none"))  # not there: what is unknown is an error
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def _sentencepiece(tokenizer: Tokenizer) -> Any:
    """Pieces with spaces as they are, so that SentencePiece's mark for one is a character like others."""
    from sentencepiece import sentencepiece_model_pb2 as messages
    from tokenizers import Tokenizer, decoders, models

    proto = messages.ModelProto.FromString(tokenizer.files["tokenizer.model"])  # type: ignore[attr-defined]
    names = [p.piece.replace(SPACE_MARK, " ") if p.type == p.NORMAL else p.piece for p in proto.pieces]
    text = [p.type in (p.NORMAL, p.USER_DEFINED) for p in proto.pieces]
    unknown = proto.trainer_spec.unk_id
    model: Any
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model = models.Unigram([(name, p.score) for name, p in zip(names, proto.pieces, strict=True)], unknown, True)
    else:
        vocab = {name: i for i, name in enumerate(names)}
        ranked = sorted((i for i in range(len(names)) if text[i]), key=lambda i: -proto.pieces[i].score)
        merges = _pairs([names[i] for i in ranked], {names[i]: k for k, i in enumerate(ranked)})
        model = models.BPE(vocab, merges, unk_token=names[unknown], byte_fallback=True, fuse_unk=True)
    made = Tokenizer(model)
    others = [name for name, of_text in zip(names, text, strict=True) if not of_text]
    made.pre_tokenizer = _apart(others, [name for name, of_text in zip(names, text, strict=True) if of_text])
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def _apart(others: list[str], pieces: list[str]) -> Any:
    """Return what keeps a text from being read as pieces that only look like text, such as <unk> and <0x41>.

    It cuts them where no piece of text would reach over the cut. Without such a place they are left, and found by
    `difference`.
    """
    from tokenizers import Regex, pre_tokenizers

    neighbours = {piece[k : k + 2] for piece in pieces for k in range(len(piece) - 1)}
    cuts = []
    for name in others:
        free = (k for k in range(1, len(name)) if name[k - 1 : k + 1] not in neighbours)
        if k := next(free, 0):
            cuts.append(f"{re.escape(name[:k])}(?={re.escape(name[k:])})")
    return pre_tokenizers.Split(Regex("|".join(cuts) or r"\A\Z"), "merged_with_previous")


def _pairs(names: list[str], rank: dict[str, int]) -> list[tuple[str, str]]:
    """Return all two pieces that make a third, by the rank of the third, which is its place in `names`."""
    pairs = []
    for name in names:
        splits = ((name[:k], name[k:]) for k in range(1, len(name)))
        found = [(a, b) for a, b in splits if a in rank and b in rank]
        pairs += sorted(found, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return pairs


def _stand_ins() -> list[str]:
    """Return the characters by which GPT-2's files name the 256 bytes: themselves if they print, else from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]
