"""Tasks that are examples, one JSON object a line: LAMBADA, multiple choice, minimal pairs.

What is scored and how follows lm-evaluation-harness, which gets the same numbers from the same model and lines. The
unit of standard errors is the example.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aether.data.tokenizers import Tokenizer
from aether.evaluate.requests import pair
from aether.evaluate.tasks.lines import index, read_lines, text, texts
from aether.evaluate.tasks.statistics import exponential, mean, over
from aether.evaluate.tasks.task import Options, Scores, Task

DELIMITER = " "  # between a context and what is scored, also where the context is empty


def lambada(file: str, tokenizer: Tokenizer, options: Options) -> Task:
    """Predict the end of a text (Paperno et al., 2016). Lines: `context`, `continuation`.

    `perplexity` of continuations, exp(−mean log p), each a whole; `accuracy`, the share of them of which every token
    is the likeliest.
    """
    ask = _asker(tokenizer, options)

    def parse(record: dict[str, Any]) -> list:
        return [ask(text(record, "context", empty=True), text(record, "continuation"))]

    def summarise(scores: Scores) -> dict[str, Any]:
        perplexity = exponential(over(mean([s.log_p for s in scores]), -1.0))
        return dict(perplexity=perplexity, accuracy=mean([float(s.greedy) for s in scores]))

    return _task(file, parse, lambda scores, _: summarise(scores))


def choice(file: str, tokenizer: Tokenizer, options: Options) -> Task:
    """Choose an answer. Lines: `query`, `choices`, `gold`, the number of the right one, counted from 0.

    `accuracy`: the right choice is the likeliest; `accuracy_norm`: it has the highest log p / characters of the choice.
    Of equals the first counts.
    """
    ask = _asker(tokenizer, options)
    gold: list[int] = []
    lengths: list[np.ndarray] = []

    def parse(record: dict[str, Any]) -> list:
        choices = texts(record, "choices")
        gold.append(index(record, "gold", len(choices)))
        lengths.append(np.array([float(len(c)) for c in choices]))
        query = text(record, "query", empty=True)
        return [ask(query, c) for c in choices]

    def summarise(scores: Scores, sizes: list[int]) -> dict[str, Any]:
        likely = list(_grouped(scores, sizes))
        norms = [log_p / length for log_p, length in zip(likely, lengths, strict=True)]
        return dict(accuracy=_right(likely, gold), accuracy_norm=_right(norms, gold))

    return _task(file, parse, summarise)


def pairs(file: str, tokenizer: Tokenizer, options: Options) -> Task:
    """Tell good sentences from bad ones (BLiMP: Warstadt et al., 2020). Lines: `sentence_good`, `sentence_bad`.

    `accuracy`: the share of lines where the good one is likelier; equally likely counts as right, as in the harness.
    """
    ask = _asker(tokenizer, options)

    def parse(record: dict[str, Any]) -> list:
        return [ask("", text(record, key)) for key in ("sentence_good", "sentence_bad")]

    def summarise(scores: Scores, sizes: list[int]) -> dict[str, Any]:
        return dict(accuracy=_right(list(_grouped(scores, sizes)), [0] * len(sizes)))

    return _task(file, parse, summarise)


def _asker(tokenizer: Tokenizer, options: Options) -> Callable[[str, str], Any]:
    return lambda context, answer: pair(tokenizer, context, DELIMITER + answer, options.context)


def _task(file: str, parse: Callable[[dict[str, Any]], list], summarise: Callable[[Scores, list[int]], dict]) -> Task:
    examples = list(read_lines(file, parse))
    sizes = [len(e) for e in examples]
    requests = [request for example in examples for request in example]
    counts = dict(examples=len(examples))
    return Task(requests, counts, lambda scores: summarise(scores, sizes))


def _grouped(scores: Scores, sizes: list[int]) -> Iterator[np.ndarray]:
    """Yield the log-probabilities of each example."""
    begin = 0
    for size in sizes:
        yield np.array([s.log_p for s in scores[begin : begin + size]])
        begin += size


def _right(values: list[np.ndarray], gold: list[int]) -> Any:
    return mean([float(np.argmax(v) == g) for v, g in zip(values, gold, strict=True)])
