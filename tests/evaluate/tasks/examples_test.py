"""Examples from files: what is asked, what is reported of scores that are made up, and which lines are refused."""

import gzip
import json
import math

import numpy as np
import pytest

from aether.config import DataConfig
from aether.data.tokenizers import Bytes, chars_tokenizer
from aether.errors import InputError
from aether.evaluate.likelihood import Score
from aether.evaluate.tasks.examples import choice, lambada, pairs
from aether.evaluate.tasks.task import Options

OPTIONS = Options(DataConfig(context=40), None)


def written(folder, *lines, name="x.jsonl"):
    file = folder / name
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    content = text.encode("utf-8", "surrogatepass")
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(file)


def asked(task):
    """Return what is scored of which whole, as text; end of text is |."""
    texts = [bytes(i if i < 256 else 124 for i in r.ids).decode() for r in task.requests]
    return [(t, t.encode()[-r.scored :].decode()) for t, r in zip(texts, task.requests, strict=True)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_lambada(tmp_path, name):
    lines = [dict(context="The end of", continuation="it"), dict(context="Gut \n", continuation="größer", more=1)]
    file = tmp_path / name
    written(tmp_path, *lines, "", dict(context="", continuation="so"), name=name)
    task = lambada(str(file), Bytes(), OPTIONS)
    assert asked(task) == [("The end of it", " it"), ("Gut \n größer", " \n größer"), ("| so", " so")]
    assert task.counts == dict(examples=3)
    found = task.summarise([Score(-1.0, True), Score(-4.0, False), Score(-2.5, True)])
    nats = np.array([1.0, 4.0, 2.5])
    assert found["perplexity"] == pytest.approx((math.exp(2.5), math.exp(2.5) * nats.std(ddof=1) / math.sqrt(3)))
    assert found["accuracy"] == pytest.approx((2 / 3, np.std([1, 0, 1], ddof=1) / math.sqrt(3)))


def test_choice(tmp_path):
    lines = [
        dict(query="Q:", choices=["a", "bcdé"], gold=1),
        dict(query="R:", choices=["a", "b", "cc"], gold=0),
        dict(query="", choices=["aa", "b"], gold=1),
    ]
    task = choice(written(tmp_path, *lines), Bytes(), OPTIONS)
    assert asked(task)[:3] == [("Q: a", " a"), ("Q: bcdé", " bcdé"), ("R: a", " a")]
    assert asked(task)[5:] == [("| aa", " aa"), ("| b", " b")]
    log_p = [-1.0, -3.5, -2.0, -2.0, -3.9, -3.0, -1.4]  # by characters: -1, -.875; -2, -2, -1.95; -1.5, -1.4
    found = task.summarise([Score(p, False) for p in log_p])
    assert found["accuracy"].value == pytest.approx(2 / 3)  # wrong, right as the first of equals, right
    assert found["accuracy_norm"].value == pytest.approx(2 / 3)  # right by characters not bytes, wrong, right
    assert found["accuracy"].stderr == pytest.approx(1 / 3)


def test_pairs(tmp_path):
    lines = [dict(sentence_good="Cats purr.", sentence_bad="Cats purrs."), dict(sentence_good="b", sentence_bad="a")]
    task = pairs(written(tmp_path, *lines), Bytes(), OPTIONS)
    assert asked(task)[:2] == [("| Cats purr.", " Cats purr."), ("| Cats purrs.", " Cats purrs.")]
    assert task.summarise([Score(p, False) for p in (-2.0, -3.0, -5.0, -4.0)]) == dict(accuracy=(0.5, 0.5))


GOOD = {
    lambada: dict(context="a", continuation="b"),
    choice: dict(query="a", choices=["b", "c"], gold=0),
    pairs: dict(sentence_good="a", sentence_bad="b"),
}


@pytest.mark.parametrize(
    ("task", "bad", "says"),
    [
        (lambada, "{", "it is not JSON"),
        (lambada, "[" * 10**5, "it is not JSON"),
        (lambada, '"a"', 'it holds "a"; each line takes a JSON object'),
        (lambada, dict(context="a"), "it has no 'continuation'; it has 'context'"),
        (lambada, "{}", "it has no 'context'; it has nothing"),
        (lambada, dict(context=None, continuation="b"), "'context' is null; it takes text"),
        (lambada, dict(context="a", continuation=""), "'continuation' is \"\"; it takes text that is not empty"),
        (lambada, dict(context="a", continuation="x" * 41), "'.x{38}…' is 42 tokens long.*data.context=40"),
        (lambada, '{"context": "\\ud800", "continuation": "b"}', "'context' is not valid Unicode at character 0"),
        (choice, dict(query="a", choices=["b", "c"]), "it has no 'gold'; it has 'query', 'choices'"),
        (choice, dict(query="a", choices=["b", "c"], gold=2), "'gold' is 2; it takes one of 0 to 1"),
        (choice, dict(query="a", choices=["b", "c"], gold=-1), "'gold' is -1; it takes one of 0 to 1"),
        (choice, dict(query="a", choices=["b", "c"], gold="1"), "'gold' is \"1\"; it takes one of 0 to 1"),
        (choice, dict(query="a", choices=["b", "c"], gold=True), "'gold' is true; it takes one of 0 to 1"),
        (choice, dict(query="a", choices=[], gold=0), "'choices' is ..; it takes a list of at least two texts"),
        (choice, dict(query="a", choices="bc", gold=0), "'choices' is \"bc\"; it takes a list"),
        (choice, dict(query="a", choices=["b", ""], gold=0), "entry 1 of 'choices' is \"\"; it takes text"),
        (choice, dict(query="a", choices=["b", 3], gold=0), "entry 1 of 'choices' is 3; it takes text"),
        (pairs, dict(sentence_good="a"), "it has no 'sentence_bad'"),
        (pairs, dict(sentence_good=["a"], sentence_bad="b"), "'sentence_good' is"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, task, bad, says):
    file = written(tmp_path, GOOD[task], "", bad, GOOD[task])
    with pytest.raises(InputError, match=f"x.jsonl line 3: {says}") as caught:
        task(file, Bytes(), OPTIONS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(file)


def test_bytes_that_are_no_text_and_characters_that_nobody_knows(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(json.dumps(GOOD[lambada]).encode() + b'\n{"context": "\xff"}\n')
    with pytest.raises(InputError, match="x.jsonl line 2: it is not UTF-8 at byte 13"):
        lambada(str(file), Bytes(), OPTIONS)
    with pytest.raises(InputError, match="line 2: data.tokenizer=chars knows .* not 'c'"):
        lambada(written(tmp_path, GOOD[lambada], dict(context="c", continuation="a")), chars_tokenizer("ab "), OPTIONS)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="x.jsonl is empty"):
        pairs(str(tmp_path / "x.jsonl"), Bytes(), OPTIONS)
