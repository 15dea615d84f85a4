"""Tokenizers of the library: the same ids as ours, on whatever text, or none."""

import base64
import json
import random

import pytest

from aether.data.tokenizers import EOT, Bytes, chars_tokenizer, load_tokenizer
from aether.export.source import NOTES
from aether.export.tokenizer import MASK, TEXTS, difference, make, write_tokenizer
from tools import train_tokenizer

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
FACTS = dict(causal=True, context=12)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a file of mixed text."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "mixed.txt"
    words = [word for line in TEXTS[:9] for word in line.split()]
    lines = (" ".join(rng.choices(words, k=12)) + rng.choice(["\n", "\n\n", "  \n", ".\t"]) for _ in range(400))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizers(text, tmp_path_factory):
    """Return a tokenizer of each kind, made from that text."""
    folder, content = tmp_path_factory.mktemp("tokenizers"), text.read_text(encoding="utf-8")
    made = dict(bytes=Bytes(), chars=chars_tokenizer(content), gpt2=load_tokenizer(f"gpt2:{_ranks(folder, content)}"))
    for kind in ("bpe", "unigram", "char"):
        flags = train_tokenizer.define()
        out = folder / f"{kind}.model"
        flags(["train_tokenizer", f"--path={text}", f"--out={out}", f"--type={kind}", "--vocab_size=500"])
        train_tokenizer.main(flags)
        made[kind] = load_tokenizer(str(out))
    return made


def _ranks(folder, content):
    """Write a table of byte pairs as OpenAI's, learned the slow way from a text; return its folder."""
    words = [[bytes([b]) for b in f" {word}".encode()] for word in content.split()[:600]]
    pieces = [bytes([b]) for b in range(256)]
    for _ in range(200):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        first, second = max(counts, key=lambda pair: (counts[pair], pair))
        if first + second not in pieces:
            pieces.append(first + second)
        for word in words:
            for k in range(len(word) - 2, -1, -1):
                if word[k : k + 2] == [first, second]:
                    word[k : k + 2] = [first + second]
    lines = (base64.b64encode(piece) + b" %d\n" % k for k, piece in enumerate(pieces))
    (folder / "r50k_base.tiktoken").write_bytes(b"".join(lines))
    return folder


@pytest.mark.parametrize("kind", ["bytes", "chars", "gpt2", "bpe", "char"])
def test_the_same_ids(kind, tokenizers, text, tmp_path):
    ours, content = tokenizers[kind], text.read_text(encoding="utf-8")
    assert difference(ours, make(ours), (*TEXTS, content)) == ""
    write_tokenizer(ours, FACTS, tmp_path)
    assert not (tmp_path / NOTES).exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = ours.encode(content).tolist()
    assert theirs(content, add_special_tokens=False).input_ids == wanted
    assert theirs(content).input_ids == [ours.eot, *wanted]
    assert theirs.decode(wanted) == content
    assert theirs.decode([ours.eot], skip_special_tokens=False) == EOT
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eot and theirs.padding_side == "left"


def test_the_same_ids_of_unigrams(tokenizers, text, tmp_path):
    """Long runs of one character, which may be cut in ways of the same probability, decide whether it is written."""
    ours = tokenizers["unigram"]
    made = make(ours)
    assert difference(ours, made, (*TEXTS[:9], text.read_text(encoding="utf-8"))) == ""
    write_tokenizer(ours, FACTS, tmp_path)
    differs = difference(ours, made, TEXTS) != ""
    assert (tmp_path / NOTES).exists() == differs and (tmp_path / "tokenizer.json").exists() != differs


def test_what_masks_is_the_next_id(tokenizers, tmp_path):
    ours = tokenizers["bpe"]
    write_tokenizer(ours, FACTS | dict(causal=False), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == ours.vocab_size
    got = theirs(f"says {MASK} next", add_special_tokens=False).input_ids
    assert got == [*ours.encode("says "), ours.vocab_size, *ours.encode(" next")]
    assert MASK in (tmp_path / NOTES).read_text()


def test_other_ids_are_refused(tokenizers, tmp_path, monkeypatch):
    ours = tokenizers["bpe"]
    monkeypatch.setattr("aether.export.tokenizer._pairs", lambda names, rank: [])
    write_tokenizer(ours, FACTS, tmp_path)
    assert "of 'The model reads a line" in (tmp_path / NOTES).read_text()
    assert not (tmp_path / "tokenizer.json").exists()


def test_unknown_characters_are_errors(tokenizers):
    made = make(tokenizers["chars"])
    with pytest.raises(Exception, match="UNK"):
        made.encode("Þ")
    assert "Aether makes None" in difference(tokenizers["chars"], make(Bytes()), ["Þ"])
    assert json.loads(made.to_str())["model"]["vocab"]["a"] == tokenizers["chars"].encode("a")[0]
