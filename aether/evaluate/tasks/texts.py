"""Tasks that are texts: perplexity by document, and over one long text in strides."""

import math
import re
from typing import Any

import numpy as np

from aether.data.cache import find
from aether.data.prepared import Prepared
from aether.data.sources import read_items
from aether.data.tokenizers import Tokenizer
from aether.errors import InputError
from aether.evaluate.requests import rolling, strided
from aether.evaluate.tasks.statistics import exponential, over, ratio
from aether.evaluate.tasks.task import Options, Scores, Task


def documents(path: str, tokenizer: Tokenizer, options: Options) -> Task:
    """Score whole documents, each behind an end of text, as lm-evaluation-harness's rolling log-likelihood.

    `token_perplexity`, `word_perplexity` and `byte_perplexity` are exp(nats / count), words being what white space
    parts (also before the first and behind the last); `bits_per_byte` is nats / ln 2 / bytes. The unit of standard
    errors is the document.
    """
    texts = _texts(path, options)
    encoded = [_encoded(tokenizer, name, text) for name, text in texts]
    windows = [list(rolling(ids, tokenizer.eot, options.context)) for ids in encoded]
    counts = dict(
        token=[len(ids) for ids in encoded],
        word=[1 + sum(1 for _ in re.finditer(r"\s+", text.decode(errors="replace"))) for _, text in texts],
        byte=[len(text) for _, text in texts],
    )

    if not any(counts["token"]):
        raise InputError(f"{path} holds no text that the tokenizer makes tokens of; give other text.")

    def summarise(scores: Scores) -> dict[str, Any]:
        left = iter(scores)
        nats = [-sum(next(left).log_p for _ in part) for part in windows]
        means = {unit: ratio(nats, sizes) for unit, sizes in counts.items()}
        found = {f"{unit}_perplexity": exponential(m) for unit, m in means.items()}
        return found | dict(bits_per_byte=over(means["byte"], math.log(2)))

    sums = {f"{unit}s": sum(sizes) for unit, sizes in counts.items()}
    return Task([r for part in windows for r in part], dict(documents=len(texts), **sums), summarise)


def sliding(path: str, tokenizer: Tokenizer, options: Options) -> Task:
    """Score a text as one sequence in overlapping windows, by default half a context apart.

    Documents are joined by an empty line. `perplexity` is that of Hugging Face's published code ("Perplexity of
    fixed-length models"): exp of the mean over windows, in which one that scores the ids since the window before it,
    k of them, weighs k − 1. In `token_perplexity` every scored token weighs the same; `bits_per_byte` is nats / ln 2
    / bytes of the text without its first token, which has nothing before it. The unit of standard errors is the window.
    """
    stride = options.stride or max(options.context // 2, 1)
    if stride > options.context:
        raise InputError(f"--stride is {stride}, but the model reads data.context={options.context}; make it smaller.")
    text = b"\n\n".join(text for _, text in _texts(path, options))
    ids = _encoded(tokenizer, path, text)
    windows = list(strided(ids, options.context, stride))
    if not windows:
        raise InputError(f"{path} holds fewer than two tokens, and the first has nothing before it; give more text.")
    counts, weights = [w.scored for w, _ in windows], [new - 1 for _, new in windows]
    size = len(text) - int(tokenizer.token_bytes[ids[0]])

    def summarise(scores: Scores) -> dict[str, Any]:
        nats = [-s.log_p for s in scores]
        each = ratio(nats, counts)
        weighed = ratio([n / c * w for n, c, w in zip(nats, counts, weights, strict=True)], weights)
        return dict(
            perplexity=exponential(weighed),
            token_perplexity=exponential(each),
            bits_per_byte=over(each, size / sum(counts) * math.log(2)),
        )

    sums = dict(windows=len(windows), tokens=sum(counts), bytes=size, stride=stride)
    return Task([w for w, _ in windows], sums, summarise)


def _texts(path: str, options: Options) -> list[tuple[str, bytes]]:
    """Return (name, bytes) of the documents behind what `data.path` takes; of a set with a held-out split, that."""
    place = find(path, options.data, key="it")
    if isinstance(place, Prepared):
        raise InputError(f"{path} was prepared for training and holds token ids; give the text that it was made from.")
    texts = list(read_items(place, place.held_out or place.items, options.data))
    if not texts:
        raise InputError(f"{path} holds no text; give a file, folder or glob with some.")
    return texts


def _encoded(tokenizer: Tokenizer, name: str, text: bytes) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except InputError as e:
        raise InputError(f"{name}: {e}") from e
