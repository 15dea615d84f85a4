"""The data of each task behind one call, and what a run's folder keeps of them."""

import numpy as np
import pytest

from aether.config import build
from aether.data.corpus import TOKENIZER, load_validation, masked_view, open_corpus
from aether.data.images.load import Labels
from aether.data.loader import evaluation_batches, train_batches
from aether.data.tokenizers import restore_tokenizer
from aether.errors import InputError
from aether.testing import tiny_images, tiny_text


def config(path, kind, **data):
    return build(dict(model=dict(kind=kind), data=dict(path=str(path), context=16, batch_size=4, **data)))


def test_text_is_masked_for_an_encoder_alone(tmp_path):
    text = tiny_text(tmp_path, 200)
    plain, masked = (open_corpus(config(text, kind)) for kind in ("aether", "minibert"))
    assert plain.fingerprint == masked.fingerprint and masked.labels is None
    batch = next(train_batches(masked.train, config(text, "minibert").data, 0))
    mask_id = masked.tokenizer.vocab_size
    chosen = batch["mask"] > 0
    assert chosen.any(1).all() and (batch["tokens"] == mask_id).any() and (batch["targets"] < mask_id).all()
    assert (batch["tokens"] == batch["targets"])[~chosen].all()
    original = next(train_batches(plain.train, config(text, "aether").data, 0))
    np.testing.assert_array_equal(batch["targets"], original["tokens"][:, :-1])
    assert masked.resolved(config(text, "minibert")).model.vocab == mask_id


def test_masks_differ_by_step_and_seed_and_not_by_call(tmp_path):
    text = tiny_text(tmp_path, 200)
    c = config(text, "bert")
    corpus = open_corpus(c)
    count = len(corpus.train[0].examples)

    def tokens(seed, step):
        return next(train_batches(corpus.train, c.data, seed, step))["tokens"]

    assert (tokens(0, 0) == tokens(0, 0)).all() and not (tokens(0, 0) == tokens(1, 0)).all()
    epoch = -(-count // 4)
    first, second = ({tuple(row) for step in range(k, k + epoch) for row in tokens(0, step)} for k in (0, epoch))
    assert len(first & second) < 0.2 * len(first), "another epoch masks other tokens"
    once, twice = (list(evaluation_batches(corpus.validation["validation"], c.data)) for _ in range(2))
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(once, twice, strict=True))


def test_what_a_run_keeps_is_what_reads_its_data_again(tmp_path):
    text, images = tiny_text(tmp_path, 200), tiny_images(tmp_path)
    corpus = open_corpus(config(text, "minibert"))
    corpus.save(tmp_path / "text")
    tokenizer = restore_tokenizer(str(tmp_path / "text" / TOKENIZER))
    assert tokenizer.hash == corpus.tokenizer.hash
    windows = load_validation(str(text), config(text, "minibert").data, tokenizer)
    assert masked_view(windows, 0.15, tokenizer)[0]["mask"].any()
    pictures = open_corpus(config(images, "resnet", validation_fraction=0.25))
    pictures.save(tmp_path)
    assert Labels.restore(str(tmp_path)) == pictures.labels and pictures.tokenizer is None
    model = pictures.resolved(config(images, "resnet")).model
    assert (model.classes, len(pictures.validation["validation"])) == (3, 24)


def test_text_is_no_set_of_images(tmp_path):
    with pytest.raises(InputError, match="tiny.txt"):
        open_corpus(config(tiny_text(tmp_path, 50), "resnet"))
