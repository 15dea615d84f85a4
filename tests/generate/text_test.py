"""Streams of text: whole characters, several samples read in any order, prompts that cannot be encoded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.data.tokenizers import chars_tokenizer, load_tokenizer
from aether.errors import InputError
from aether.generate.text import decode_stream, encode_prompt, text_stream, text_streams

BYTES = load_tokenizer("bytes")


class Scripted:
    """A decoder that says what it was told to, and notes what it was asked."""

    def __init__(self, *rows: bytes):
        width = max(map(len, rows))
        self.ids = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int32)
        self.made = 0

    def stream(self, params, prompt, max_tokens, **settings):
        self.asked = params, prompt.tolist(), max_tokens, settings
        for ids in self.ids.T[:max_tokens]:
            self.made += 1
            yield ids


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=80, deadline=None)
def test_bytes_never_split_a_character(text):
    pieces = list(decode_stream(BYTES, BYTES.encode(text).tolist()))
    assert pieces == list(text)


def test_a_character_comes_with_its_last_byte():
    steps = iter(BYTES.encode("é€😀").tolist())
    taken = []

    def counted():
        for i in steps:
            taken.append(i)
            yield i

    stream = decode_stream(BYTES, counted())
    assert [(next(stream), len(taken)) for _ in range(3)] == [("é", 2), ("€", 5), ("😀", 9)]


def test_bytes_that_are_no_text_are_replaced():
    assert "".join(decode_stream(BYTES, b"a\xff\xe2\x82b\xf0\x9f")) == "a\ufffd\ufffdb\ufffd"


def test_text_ends_at_the_first_negative_id():
    assert "".join(decode_stream(BYTES, [97, 98, -1, 99])) == "ab"


def test_end_of_text_is_silent():
    assert list(decode_stream(BYTES, [97, BYTES.eot, 98])) == ["a", "b"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_samples_are_read_in_any_order(order):
    decoder = Scripted(b"one", "zwei €".encode(), b"")
    streams = text_streams(decoder, "params", BYTES, "ab", 50, num=3, temperature=0.5)
    texts = {i: "".join(streams[i]) for i in order}
    assert texts == {0: "one", 1: "zwei €", 2: ""}
    assert decoder.asked == ("params", [97, 98], 50, dict(num=3, temperature=0.5))
    assert decoder.made == 8  # once for all three


def test_the_first_piece_comes_after_the_first_token():
    decoder = Scripted(b"abc", b"xyz")
    first, _ = text_streams(decoder, None, BYTES, "", 3, num=2)
    assert (next(first), decoder.made) == ("a", 1)


def test_one_stream_is_the_new_text_alone():
    assert list(text_stream(Scripted(b"cd"), None, BYTES, "ab", 9, seed=1)) == ["c", "d"]


def test_a_prompt_that_cannot_be_encoded_is_refused_at_once():
    with pytest.raises(InputError, match=r"(?s)The prompt 'aé' cannot be encoded.*U\+00E9"):
        text_streams(Scripted(b"x"), None, chars_tokenizer("abc"), "aé", 5)
    with pytest.raises(InputError, match="The prompt is not UTF-8 at character 1"):
        encode_prompt(BYTES, "a\udcff")
