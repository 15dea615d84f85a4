"""Perplexities of texts under a model that is a table, against their definitions."""

import math
import re

import numpy as np
import pytest

from aether.config import DataConfig
from aether.data.cache import prepare_cached
from aether.data.sources import find_source
from aether.data.tokenizers import Bytes
from aether.errors import InputError
from aether.evaluate.likelihood import Score
from aether.evaluate.tasks.task import Options
from aether.evaluate.tasks.texts import documents, sliding

CONTEXT = 8
LOG_P = np.log(np.random.default_rng(1).dirichlet(np.full(257, 0.3), 257 * CONTEXT))  # of (id before, ids seen)
TEXTS = ["Zwölf Boxkämpfer jagen", " Viktor quer", "x", "über\tden  großen Sylter Deich. "]


def logits(ids):
    """What the model says after each of ids: by the one before, and how many it sees."""
    return np.array([LOG_P[i * CONTEXT + k] for k, i in enumerate(ids)])


def scored(task):
    found = []
    for r in task.requests:
        assert 1 < len(r.ids) <= CONTEXT + 1
        each = logits(r.ids[:-1])[np.arange(len(r.ids) - 1), r.ids[1:]]
        found.append(Score(float(each[-r.scored :].sum()), False))
    return found


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    return str(tmp_path)


def options(stride=None):
    return Options(DataConfig(context=CONTEXT), stride)


def test_documents(folder):
    task = documents(folder, Bytes(), options())
    found = task.summarise(scored(task))
    nats = []
    for text in TEXTS:  # with windows of CONTEXT inputs, the last one full
        ids, total = [256, *text.encode()], 0.0
        for begin in range(1, len(ids), CONTEXT):
            end = min(begin + CONTEXT, len(ids))
            seen = ids[max(end - CONTEXT - 1, 0) : end]
            each = logits(seen[:-1])[np.arange(len(seen) - 1), seen[1:]]
            total -= each[-(end - begin) :].sum()
        nats.append(total)
    size, words = sum(len(t.encode()) for t in TEXTS), sum(len(re.split(r"\s+", t)) for t in TEXTS)
    assert task.counts == dict(documents=4, tokens=size, words=words, bytes=size)
    for name, count in (("token", size), ("word", words), ("byte", size)):
        assert found[f"{name}_perplexity"].value == pytest.approx(math.exp(sum(nats) / count))
    assert found["bits_per_byte"].value == pytest.approx(sum(nats) / size / math.log(2))
    r, n = sum(nats) / size, len(TEXTS)
    spread = sum((x - r * len(t.encode())) ** 2 for x, t in zip(nats, TEXTS, strict=True))
    assert found["bits_per_byte"].stderr == pytest.approx(math.sqrt(n / (n - 1) * spread) / size / math.log(2))


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_sliding_is_hugging_face_s(folder, stride):
    task = sliding(folder, Bytes(), options(stride))
    found = task.summarise(scored(task))
    text = "\n\n".join(TEXTS).encode()
    ids, before, nll_sum, n_tokens, exact, count = np.array([*text]), 0, 0.0, 0, 0.0, 0
    for begin in range(0, len(ids), stride or CONTEXT // 2):
        end = min(begin + CONTEXT, len(ids))
        labels = ids[begin:end].copy()
        labels[: -(end - before)] = -100
        counts = labels[1:] != -100
        each = -logits(ids[begin:end])[:-1][counts, labels[1:][counts]]
        loss = each.mean()
        new = int((labels != -100).sum()) - 1
        nll_sum, n_tokens = nll_sum + loss * new, n_tokens + new
        exact, count = exact + each.sum(), count + counts.sum()
        before = end
        if end == len(ids):
            break
    assert found["perplexity"].value == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-9)
    assert found["token_perplexity"].value == pytest.approx(math.exp(exact / count), rel=1e-9)
    assert found["bits_per_byte"].value == pytest.approx(exact / math.log(2) / (len(text) - 1), rel=1e-9)
    assert task.counts["tokens"] == count and task.counts["stride"] == (stride or 4)
    assert found["token_perplexity"].stderr > 0
    assert (found["perplexity"].stderr > 0) == (stride != 1)  # there only the first window counts


def test_any_source_of_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one two"}\n{"text": ""}\n{"text": "three"}\n')
    assert documents(str(tmp_path / "x.jsonl"), Bytes(), options()).counts["documents"] == 2
    assert documents(f"{tmp_path}/*.jsonl", Bytes(), options()).counts["words"] == 3
    (tmp_path / "y.bin").write_bytes(b"\xff\xfe \x00")
    bytes_too = Options(DataConfig(context=CONTEXT, tokenizer="bytes"), None)
    assert documents(str(tmp_path / "y.bin"), Bytes(), bytes_too).counts["bytes"] == 4


@pytest.mark.parametrize(
    ("make", "name", "content", "stride", "says"),
    [
        (documents, "nowhere.txt", None, None, "nowhere.txt does not exist"),
        (documents, "x.txt", "", None, "x.txt holds no text"),
        (documents, "x.jsonl", '{"text": "a"}\n{"words": 1}\n', None, "x.jsonl line 2 has no 'text'"),
        (sliding, "x.txt", "a", None, "x.txt holds fewer than two tokens"),
        (sliding, "x.txt", "a" * 99, 9, "--stride is 9, but the model reads data.context=8"),
    ],
)
def test_texts_that_cannot_be_scored(tmp_path, make, name, content, stride, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        make(str(tmp_path / name), Bytes(), options(stride))


def test_token_ids_are_not_text(folder):
    config = DataConfig(context=CONTEXT, validation_fraction=0.0)
    prepared = prepare_cached(find_source(folder, config), config, Bytes())
    with pytest.raises(InputError, match="was prepared for training and holds token ids"):
        documents(prepared.folder, Bytes(), options())
