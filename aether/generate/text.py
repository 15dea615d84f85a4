"""From ids to text that can be shown as it comes."""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from aether.data.tokenizers import Tokenizer
from aether.errors import InputError
from aether.generate.decode import Decoder


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Any:
    """Return the ids of a prompt.

    Raises:
      InputError: it is not valid text, or has characters that the tokenizer does not know.
    """
    try:
        return tokenizer.encode(prompt.encode())
    except UnicodeEncodeError as e:
        raise InputError(
            f"The prompt is not UTF-8 at character {e.start}; give text in the terminal's encoding."
        ) from e
    except InputError as e:
        raise InputError(f"The prompt {prompt!r} cannot be encoded: {e}") from e


def text_streams(
    decoder: Decoder, params: Any, tokenizer: Tokenizer, prompt: str, max_tokens: int, *, num: int = 1, **settings: Any
) -> list[Iterator[str]]:
    """Return `num` continuations of a prompt, each in pieces as they come, without the prompt.

    They are decoded together: while one is read, the others are kept. `settings` are those of `Decoder.stream`.

    Raises:
      InputError: the tokenizer cannot encode the prompt.
    """
    ids = encode_prompt(tokenizer, prompt)
    steps = decoder.stream(params, ids, max_tokens, num=num, **settings)
    return [decode_stream(tokenizer, _column(copy, i)) for i, copy in enumerate(itertools.tee(steps, num))]


def text_stream(
    decoder: Decoder, params: Any, tokenizer: Tokenizer, prompt: str, max_tokens: int, **settings: Any
) -> Iterator[str]:
    """Return the one continuation of a prompt in pieces, as `text_streams` does for several."""
    return text_streams(decoder, params, tokenizer, prompt, max_tokens, num=1, **settings)[0]


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids, up to the first negative one, in pieces that never split a character.

    Bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in itertools.takewhile(lambda i: i >= 0, ids):
        if piece := decoder.decode(tokenizer.decode([i])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def _column(steps: Iterable[Any], i: int) -> Iterator[int]:
    return (int(ids[i]) for ids in steps)
