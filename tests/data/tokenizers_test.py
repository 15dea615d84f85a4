import base64
import importlib
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.data import tokenizers
from aether.data.tokenizers import chars_tokenizer, load_tokenizer, restore_tokenizer, save_tokenizer, split_text
from aether.errors import InputError

SAMPLE = "the cat sat on the mat\n    and the\tother cat said: 'naïve café, 日本'\n" * 40
ODD = st.text(
    st.sampled_from("abc \n\té日\U0001f600\u2581\x00<>") | st.characters(exclude_categories=["Cs"]), max_size=60
)


def bpe_folder(folder):
    """Write a GPT-2 style folder whose merges are few, as encoder.json with vocab.bpe."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    show = {b: chr(b) for b in printable}
    show |= {b: chr(256 + i) for i, b in enumerate(order[len(printable) :])}
    merges = [("t", "h"), ("th", "e"), (show[32], "the"), ("c", "a"), ("ca", "t"), (show[32], "cat")]
    names = [show[b] for b in order] + [a + b for a, b in merges]
    ids = {name: i for i, name in enumerate(names)} | {"<|endoftext|>": len(names)}
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(ids))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return f"gpt2:{folder}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sample.txt").write_text(SAMPLE)
    sys.path.insert(0, str(tokenizers.__file__).rsplit("/aether/", 1)[0])
    tool = importlib.import_module("tools.train_tokenizer")
    values = tool.define()
    values(["x", f"--path={folder}/sample.txt", f"--out={folder}/s.model", "--vocab_size=320"])
    tool.main(values)
    return dict(
        bytes=load_tokenizer("bytes"),
        sentencepiece=load_tokenizer(f"{folder}/s.model"),
        gpt2=load_tokenizer(bpe_folder(folder / "bpe")),
        chars=chars_tokenizer(SAMPLE),
    )


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt2"])
@settings(max_examples=150, deadline=None)
@given(text=ODD)
def test_every_text_comes_back_and_its_bytes_add_up(made, kind, text):
    tokenizer, raw = made[kind], text.encode()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.decode(ids) == raw
    assert tokenizer.token_bytes[ids].sum() == len(raw)
    assert not (ids == tokenizer.eot).any()
    assert tokenizer.encode(raw).tolist() == ids.tolist()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt2", "chars"])
def test_saved_and_restored(made, kind, tmp_path):
    tokenizer = made[kind]
    save_tokenizer(tokenizer, str(tmp_path / "t"))
    again = restore_tokenizer(str(tmp_path / "t"))
    assert (again.spec, again.eot, again.vocab_size, again.hash) == (
        tokenizer.spec,
        tokenizer.eot,
        tokenizer.vocab_size,
        tokenizer.hash,
    )
    assert again.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    assert tokenizer.token_bytes[tokenizer.eot] == 0 and len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert len({t.hash for t in made.values()}) == 4


def test_a_damaged_folder_is_named(made, tmp_path):
    save_tokenizer(made["chars"], str(tmp_path))
    (tmp_path / "characters.json").write_text('"abc"')
    with pytest.raises(InputError, match=f"{tmp_path} is damaged"):
        restore_tokenizer(str(tmp_path))


def test_bpe_merges_as_its_files_say(made, tmp_path):
    t = made["gpt2"]
    assert [t.pieces[i] for i in t.encode("the cat the")] == [b"the", b" cat", b" the"]
    table = "".join(f"{base64.b64encode(p).decode()} {i}\n" for i, p in enumerate(t.pieces[:-1]))
    (tmp_path / "r50k_base.tiktoken").write_text(table)
    assert load_tokenizer(f"gpt2:{tmp_path}").hash == t.hash
    assert t.vocab_size == 263 and t.eot == 262


def test_bpe_files_that_disagree(tmp_path):
    spec = bpe_folder(tmp_path / "bpe")
    merges = (tmp_path / "bpe/vocab.bpe").read_text().splitlines()
    (tmp_path / "bpe/vocab.bpe").write_text("\n".join([merges[0], *reversed(merges[1:])]))
    with pytest.raises(InputError, match="bpe has damaged files"):
        load_tokenizer(spec)
    (tmp_path / "bpe/vocab.bpe").unlink()
    with pytest.raises(InputError, match="neither r50k_base.tiktoken nor encoder.json with vocab.bpe"):
        load_tokenizer(spec)


def test_bpe_without_tiktoken_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InputError, match=r'pip install "aether\[bpe\]"'):
        load_tokenizer(bpe_folder(tmp_path / "bpe"))


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
def test_long_texts_are_cut_where_no_token_crosses(made, kind, monkeypatch):
    whole = made[kind].encode(SAMPLE).tolist()
    monkeypatch.setattr(tokenizers, "split_text", lambda text: split_text(text, 17))
    assert made[kind].encode(SAMPLE).tolist() == whole


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n\t\x1c"), max_size=80), st.integers(1, 30))
def test_split_text_keeps_all_and_splits_pieces_no_further(text, size):
    pieces = list(split_text(text, size))
    assert "".join(pieces) == text
    assert all(list(split_text(p, size)) == [p] for p in pieces)
    assert all(p[0] == " " and not q[-1].isspace() for q, p in zip(pieces, pieces[1:], strict=False))


def test_chars_are_numbered_by_code_point_and_unknown_ones_named():
    t = chars_tokenizer("hello \U0001f600")
    assert t.characters == " ehlo\U0001f600" and t.vocab_size == 7 and t.eot == 6
    assert t.encode("hell\U0001f600").tolist() == [2, 1, 3, 3, 5]
    with pytest.raises(InputError, match=r"not 'x' \(U\+0078\)"):
        t.encode("hex")
    with pytest.raises(InputError, match="not '\U0001f601'"):
        t.encode("\U0001f601")


def test_bad_specs(tmp_path):
    with pytest.raises(InputError, match="'words'; it takes bytes, chars"):
        load_tokenizer("words")
    with pytest.raises(InputError, match="no.model, which does not exist"):
        load_tokenizer(str(tmp_path / "no.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="bad.model is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))
    with pytest.raises(InputError, match="not UTF-8 at byte 2"):
        chars_tokenizer("ab").encode(b"ab\xff")
    assert load_tokenizer("bytes").encode(b"\xff").tolist() == [255]
