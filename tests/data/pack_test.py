import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.config import DataConfig
from aether.data.pack import Windows
from aether.data.prepare import prepare
from aether.data.prepared import shard_file
from aether.data.sources import find_source
from aether.data.tokenizers import load_tokenizer
from aether.errors import InputError

EOT = 256


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Return a function that prepares documents of given lengths, in shards of about 40 tokens."""
    top = tmp_path_factory.mktemp("pack")
    made = {}

    def make(lengths):
        if lengths not in made:
            file = top / f"{len(made)}.jsonl"
            letters = "abcdefghij"
            texts = ["".join(letters[(i + j) % 10] for j in range(n)) for i, n in enumerate(lengths)]
            file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
            config = DataConfig(validation_fraction=0.5 if len(lengths) > 1 else 0.0)
            source = find_source(str(file), config)
            out = str(top / f"out{len(made)}")
            made[lengths] = prepare(source, config, load_tokenizer("bytes"), out, shard_tokens=40, progress=False)
        return made[lengths]

    return make


def flat(prepared, split):
    """Return all tokens of a split."""
    ids = np.concatenate(
        [np.load(shard_file(prepared.folder, "tokens", s)) for s in range(len(prepared.manifest["shards"]))]
    )
    begin, end = prepared.splits[split]["tokens"]
    return ids[begin:end].astype(int).tolist()


def slow(tokens, index, context, segments):
    """The window written out token by token."""
    window = tokens[index * context : index * context + context + 1]
    out = dict(tokens=[], segments=[], positions=[], mask=[])
    segment, position = 1, 0
    for t in range(context + 1):
        if t >= len(window):
            out["tokens"].append(EOT)
            out["segments"].append(0)
            out["positions"].append(0)
            continue
        if segments and window[t] == EOT and t > 0:
            segment, position = segment + 1, 0
        out["tokens"].append(window[t])
        out["segments"].append(segment)
        out["positions"].append(position)
        position += 1
    out["mask"] = [int(t + 1 < len(window)) for t in range(context)]
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=2, max_size=12).map(tuple),
    st.integers(2, 30),
    st.booleans(),
    st.sampled_from(["train", "validation"]),
    st.booleans(),
)
def test_windows_are_the_slow_reference(corpora, lengths, context, segments, split, padded):
    prepared = corpora(lengths)
    tokens = flat(prepared, split)
    expected = (len(tokens) - 1 + (context - 1 if padded else 0)) // context
    if expected == 0:
        with pytest.raises(InputError, match=f"has {len(tokens)} tokens, and data.context={context}"):
            Windows(prepared, split, context, segments, EOT, padded, 257)
        return
    windows = Windows(prepared, split, context, segments, EOT, padded, 257)
    assert len(windows) == expected
    scored = []
    for i in range(expected):
        window = windows[i]
        assert all(v.dtype == np.int32 for v in window.values())
        assert {k: v.tolist() for k, v in window.items()} == slow(tokens, i, context, segments)
        scored += window["tokens"][1:][window["mask"] == 1].tolist()
    if padded:
        assert scored == tokens[1:]


def test_out_of_range_and_pickled(corpora):
    windows = Windows(corpora((50, 60, 70)), "train", 8, True, EOT, True, 257)
    again = pickle.loads(pickle.dumps(windows))
    assert (again[3]["tokens"] == windows[3]["tokens"]).all()
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


def test_an_id_beyond_the_vocabulary_is_found_where_it_is_read(corpora):
    prepared = corpora((80,))
    windows = Windows(prepared, "train", 8, True, EOT, False, 257)
    file = shard_file(prepared.folder, "tokens", 0)
    ids = np.load(file)
    ids[20] = 999
    np.save(file, ids)
    windows[0]
    with pytest.raises(InputError, match="tokens-00000.npy holds a token id beyond the vocabulary: 999"):
        windows[2]
