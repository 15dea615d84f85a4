"""Masked windows: which tokens are chosen, what becomes of them, and that evaluation never changes."""

import json
import pickle

import numpy as np
import pytest

from aether.config import DataConfig
from aether.data.masked import MaskedWindows
from aether.data.pack import Windows
from aether.data.prepare import prepare
from aether.data.sources import find_source
from aether.data.tokenizers import load_tokenizer

EOT, MASK, VOCAB = 256, 257, 257
LENGTHS = (300, 3, 1, 1, 700, 40, 990)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Documents of letters, prepared whole."""
    top = tmp_path_factory.mktemp("masked")
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(n)) for i, n in enumerate(LENGTHS)]
    (top / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = DataConfig(validation_fraction=0.0)
    source = find_source(str(top / "texts.jsonl"), config)
    return prepare(source, config, load_tokenizer("bytes"), str(top / "out"), shard_tokens=500, progress=False)


def make(prepared, context=64, rate=0.15, padded=True):
    return MaskedWindows(Windows(prepared, "train", context, True, EOT, padded, VOCAB), rate, MASK, VOCAB)


@pytest.mark.parametrize("context", [2, 64, 100])
def test_targets_are_the_text_once(prepared, context):
    windows = make(prepared, context)
    rows = [windows[i] for i in range(len(windows))]
    assert all(v.shape == (context,) and v.dtype == np.int32 for row in rows for v in row.values())
    found = np.concatenate([row["targets"][row["segments"] > 0] for row in rows])
    text = np.concatenate([[EOT, *(97 + (i + np.arange(n)) % 26)] for i, n in enumerate(LENGTHS)])
    lost = int((len(text) - 1) % context == 0)  # the last token, where its window is full without it
    np.testing.assert_array_equal(found, text[: len(text) - lost])
    plain = [windows.windows[i] for i in range(len(windows))]
    for key in ("segments", "positions"):
        np.testing.assert_array_equal([row[key] for row in rows], [w[key][:-1] for w in plain])


@pytest.mark.parametrize("rate", [0.001, 0.15, 0.4])
def test_as_many_are_chosen_as_the_rate_says(prepared, rate):
    windows, rng = make(prepared, rate=rate), np.random.default_rng(1)
    for i in range(len(windows)):
        row = windows.draw(i, rng)
        open_to_it = (row["segments"] > 0) & (row["targets"] != EOT)
        assert row["mask"].sum() == max(round(rate * open_to_it.sum()), 1)
        assert not row["mask"][~open_to_it].any()
        np.testing.assert_array_equal(row["tokens"][row["mask"] == 0], row["targets"][row["mask"] == 0])


def test_a_window_without_a_candidate_is_left_alone(prepared):
    """Windows of one token: end of text, or a letter."""
    windows = make(prepared, context=1)
    rows = [windows[i] for i in range(len(windows))]
    bare = [row for row in rows if row["targets"] == EOT]
    assert len(bare) == len(LENGTHS)
    assert all(not row["mask"].any() and row["tokens"] == EOT for row in bare)
    assert sum(row["mask"].sum() for row in rows) == len(rows) - len(bare)


def test_eight_in_ten_are_masked_and_one_is_another(prepared):
    """And every place is as likely as any other, as is every other id."""
    windows, rng = make(prepared, rate=0.5, padded=False), np.random.default_rng(2)
    rows = [windows.draw(i, rng) for _ in range(200) for i in range(len(windows))]
    tokens, targets, mask = (np.stack([row[key] for row in rows]) for key in ("tokens", "targets", "mask"))
    chosen, before = tokens[mask == 1], targets[mask == 1]
    changed = (chosen != MASK) & (chosen != before)
    shares = [(chosen == MASK).mean(), changed.mean(), (chosen == before).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=5 * (0.16 / len(chosen)) ** 0.5)
    others = np.bincount(chosen[changed], minlength=VOCAB)
    wanted = changed.sum() / VOCAB
    assert len(others) == VOCAB and np.abs(others - wanted).max() < 6 * wanted**0.5
    open_to_it = (targets != EOT) & (np.stack([row["segments"] for row in rows]) > 0)
    shares = mask.sum(0) / open_to_it.sum(0)
    assert np.abs(shares - 0.5).max() < 5 * (0.25 / len(rows)) ** 0.5


class Bits:
    """Windows of 0 and 1, the last third of them padding."""

    eot = 2

    def __getitem__(self, index):
        tokens = np.arange(301, dtype=np.int32) % 2
        return dict(tokens=tokens, segments=(tokens + np.arange(301) < 200).astype(np.int32), positions=tokens)


def test_another_is_another_and_padding_stays():
    windows, rng = MaskedWindows(Bits(), 1.0, 3, 3), np.random.default_rng(3)
    rows = [windows.draw(0, rng) for _ in range(100)]
    tokens, targets, mask = (np.stack([row[key] for row in rows]) for key in ("tokens", "targets", "mask"))
    np.testing.assert_array_equal(mask, np.stack([row["segments"] for row in rows]))
    changed = (tokens != targets) & (tokens != 3)
    assert abs(changed.sum() / mask.sum() - 0.1) < 5 * (0.09 / mask.sum()) ** 0.5


def test_evaluation_is_masked_alike_everywhere_and_training_by_its_generator(prepared):
    windows = make(prepared)
    again = pickle.loads(pickle.dumps(windows))
    pairs = [(windows[2], again[2]), *[[w.draw(2, np.random.default_rng(5)) for w in (windows, again)]]]
    for one, other in pairs:
        assert all((one[key] == other[key]).all() for key in one)
    inside = (20, 21, 22)  # of one document: nothing but the generator tells them apart
    masks = [windows[i]["mask"] for i in inside] + [windows.draw(20, np.random.default_rng(5))["mask"]]
    assert len({mask.tobytes() for mask in masks}) == 4


def test_a_blank_row_scores_nothing_and_looks_like_the_others(prepared):
    windows = make(prepared)
    blank, row = windows.blank(), windows[0]
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in row.items()}
    assert not blank["mask"].any() and not blank["segments"].any() and (blank["tokens"] == EOT).all()


def test_what_it_asks_of_its_windows(prepared):
    windows = make(prepared, context=64)
    windows.fetch([0, 1])
    assert windows.name(1) == windows.windows.name(1) and "tokens 64 to 128" in windows.name(1)
    with pytest.raises(IndexError):
        windows[len(windows)]
