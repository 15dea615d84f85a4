"""What is asked of a language model: how likely are the last ids of a sequence, given those before them?

Texts become requests by the conventions of lm-evaluation-harness and, for a text in strides, of Hugging Face's, so that
scores are comparable to those of other models.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aether.data.tokenizers import Tokenizer
from aether.errors import InputError


@dataclass(frozen=True, eq=False)
class Request:
    """A sequence of ids, int32, of which the last `scored` are to be scored, each given those before it."""

    ids: np.ndarray
    scored: int


def pair(tokenizer: Tokenizer, context: str, continuation: str, length: int) -> Request:
    """Ask for a continuation of a context.

    White space at the end of the context belongs to the continuation. The continuation's ids are those of the whole
    text behind as many as the context alone has. An empty context is an end of text. What does not fit is cut off at
    the left.

    Args:
      tokenizer: of the model.
      context: may be empty.
      continuation: with the white space that parts it from the context.
      length: ids that the model can read.

    Raises:
      InputError: the continuation has no id, or more than the model can read.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(kept + context[len(kept) :] + continuation)
    begin = len(tokenizer.encode(kept)) if kept else 0
    scored = len(whole) - begin
    if scored < 1:
        raise InputError(f"the tokenizer gives {_short(continuation)} no token of its own behind its context.")
    if scored > length:
        raise InputError(
            f"{_short(continuation)} is {scored} tokens long, and the model reads data.context={length}; "
            "leave the line out, or take a model with a longer context."
        )
    ids = whole if begin else np.append(np.int32(tokenizer.eot), whole)
    return Request(ids[-(length + 1) :], scored)


def rolling(ids: np.ndarray, eot: int, length: int) -> Iterator[Request]:
    """Ask for a whole document behind an end of text, each id once, in windows of `length`.

    The last window reaches back over ids that are scored already, so that its own have as much context as there is.
    """
    ids = np.append(np.int32(eot), ids)
    for begin in range(1, len(ids), length):
        end = min(begin + length, len(ids))
        yield Request(ids[max(end - length - 1, 0) : end], end - begin)


def strided(ids: np.ndarray, length: int, stride: int) -> Iterator[tuple[Request, int]]:
    """Ask for a text in overlapping windows of `length` ids that begin every `stride`; yield also how many are new.

    Of each window the new ids are scored, those that no window before it has, but never its first id, which has
    nothing before it. Source: Hugging Face, "Perplexity of fixed-length models".
    """
    before = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        scored = min(end - before, end - begin - 1)
        if scored:
            yield Request(ids[begin:end], scored), end - before
        before = end
        if end == len(ids):
            return


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
