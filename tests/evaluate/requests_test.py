"""What is asked of a model: every id once, with the context that the conventions give it."""

import numpy as np
import pytest

from aether.data.tokenizers import Bytes, chars_tokenizer
from aether.errors import InputError
from aether.evaluate.requests import pair, rolling, strided

BYTES = Bytes()


class Words(Bytes):
    """Merges "ab" and " c", so that a continuation may change the ids of its context."""

    def encode(self, text):
        out, i = [], 0
        while i < len(text):
            for word, number in (("ab", 900), (" c", 901)):
                if text.startswith(word, i):
                    out.append(number)
                    i += 2
                    break
            else:
                out.append(ord(text[i]))
                i += 1
        return np.array(out, np.int32)


@pytest.mark.parametrize(
    ("context", "continuation", "ids", "scored"),
    [
        ("xy", " c", [120, 121, 901], 1),
        ("xy ", "c", [120, 121, 901], 1),  # the space moves, so that " c" is one token
        ("xy \n", " c", [120, 121, 32, 10, 901], 3),
        ("", "ab", [256, 900], 1),
        (" \n", "ab", [256, 32, 10, 900], 3),
        ("xya", "bz", [120, 121, 900, 122], 1),  # "a" of the context is merged into what follows: by count, as there
    ],
)
def test_a_pair_is_divided_as_the_harness_does(context, continuation, ids, scored):
    request = pair(Words(), context, continuation, 9)
    assert (request.ids.tolist(), request.scored, request.ids.dtype) == (ids, scored, np.int32)


def test_a_long_context_is_cut_at_the_left():
    for length in range(3, 9):
        request = pair(BYTES, "abcdef", "xyz", length)
        assert bytes(request.ids.tolist()) == b"abcdefxyz"[-(length + 1) :] and request.scored == 3


@pytest.mark.parametrize(
    ("tokenizer", "context", "continuation", "says"),
    [
        (BYTES, "ab", "x" * 50, "'x{39}…' is 50 tokens long, and the model reads data.context=9"),
        (Words(), "xa", "b", "gives 'b' no token of its own"),
        (chars_tokenizer("ab"), "ab", "ä", r"not 'ä' \(U\+00E4\)"),
    ],
)
def test_what_cannot_be_asked(tokenizer, context, continuation, says):
    with pytest.raises(InputError, match=says):
        pair(tokenizer, context, continuation, 9)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 10, 11, 23])
def test_windows_of_a_document_score_every_id_once_with_as_much_context_as_there_is(count):
    ids, length = np.arange(100, 100 + count, dtype=np.int32), 5
    whole, asked = [7, *ids.tolist()], []
    for window in rolling(ids, 7, length):
        begin = len(asked) + 1
        asked += window.ids[-window.scored :].tolist()
        assert asked == whole[1 : begin + window.scored] and len(window.ids) <= length + 1
        assert window.ids.tolist() == whole[: begin + window.scored][-(length + 1) :]
    assert asked == whole[1:]


@pytest.mark.parametrize("stride", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 13, 20])
def test_strides_score_the_labels_of_the_definition(count, stride):
    ids, length = np.arange(count, dtype=np.int32), 6
    expected, before = [], 0
    for begin in range(0, count, stride):
        end = min(begin + length, count)
        labels = np.array(ids[begin:end], np.int64)
        labels[: len(labels) - (end - before)] = -100
        after = labels[1:]  # a model predicts the id after each
        if (after != -100).any():
            expected.append((ids[begin:end].tolist(), after[after != -100].tolist(), end - before))
        before = end
        if end == count:
            break
    found = [(w.ids.tolist(), w.ids[-w.scored :].tolist(), new) for w, new in strided(ids, length, stride)]
    assert found == expected
    if stride < length:
        assert [i for _, scored, _ in found for i in scored] == list(range(1, count))
