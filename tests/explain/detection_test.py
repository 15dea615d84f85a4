"""Telling scores apart, against scikit-learn and loops in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from aether.config import Pictures, build
from aether.errors import InputError
from aether.evaluate.images import image_sums, summarise_images
from aether.explain.detection import Usual, auroc, calibration_error, threshold


@pytest.mark.parametrize("levels", [3, 10, 10_000], ids=lambda n: f"{n} values")
def test_auroc_is_scikit_learns(levels, rng):
    inside, outside = rng.integers(0, levels, 70), rng.integers(levels // 3, levels + 2, 41)
    wanted = roc_auc_score(np.r_[np.zeros(70), np.ones(41)], np.r_[inside, outside])
    assert auroc(inside, outside) == pytest.approx(wanted, abs=1e-12) and wanted != 0.5
    assert auroc(outside, inside) == pytest.approx(1 - wanted, abs=1e-12)
    assert auroc(inside, inside) == pytest.approx(0.5, abs=1e-12)


def test_infinite_scores_are_the_furthest():
    assert auroc([0.0, 1.0], [np.inf, 2.0]) == 1.0 and auroc([0.0, np.inf], [np.inf]) == 0.75


@pytest.mark.parametrize(("count", "kept", "least"), [(100, 0.95, 95), (7, 0.5, 4), (30, 1.0, 30), (3, 0.01, 1)])
def test_a_threshold_keeps_the_share_and_not_one_more(count, kept, least, rng):
    scores = rng.normal(size=count)
    most = threshold(scores, kept)
    assert np.sum(scores <= most) == least and most in scores
    assert np.mean(threshold(np.r_[scores, scores], kept) >= np.r_[scores, scores]) >= kept  # ties stay together


def test_calibration_error_is_that_of_an_evaluation(rng):
    logits, labels = 2 * rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    confidence = p.max(-1)
    labels = np.where((11 * confidence).astype(int) % 2, p.argmax(-1), labels)  # too sure, or not sure enough, by turns
    right = p.argmax(-1) == labels
    wanted = 0.0
    for low in np.arange(15) / 15:
        at = (confidence >= low) & (confidence < low + 1 / 15)
        wanted += at.sum() / 200 * abs(right[at].mean() - confidence[at].mean()) if at.any() else 0.0
    got = calibration_error(confidence, right)
    assert got == pytest.approx(wanted, abs=1e-12) and got > 0.05
    config = build(dict(model=dict(kind="resnet"))).resolved(4, Pictures(4, 8, 1, 0.5, 0.5))
    batch = dict(images=jnp.zeros((200, 1)), labels=jnp.asarray(labels), mask=jnp.ones(200))
    sums = image_sums(config)(lambda images: jnp.asarray(logits, jnp.float32), batch)
    assert summarise_images(sums)["calibration_error"] == pytest.approx(got, abs=1e-6)
    assert calibration_error(np.array([1.0, 1.0]), np.array([1, 0])) == 0.5  # a certainty is in the last bin


def test_what_is_usual_is_mean_and_covariance(rng):
    rows = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)) + 3
    usual, others = Usual.of(rows), rng.normal(size=(9, 5))
    covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 80
    covariance += 1e-6 * np.trace(covariance) / 5 * np.eye(5)
    for one, got in zip(others, usual.unlike(others), strict=True):
        off = one - rows.mean(0)
        assert got == pytest.approx(off @ np.linalg.solve(covariance, off) / 5, rel=1e-9)
    assert usual.unlike(rows).mean() == pytest.approx(1.0, abs=1e-3)
    assert usual.unlike(others.astype(np.float32)) == pytest.approx(usual.unlike(others), rel=1e-4)


def test_columns_are_as_many_as_can_be_learned(rng):
    rows = rng.normal(size=(40, 100))
    assert Usual.of(rows).columns.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert len(Usual.of(rows[:3]).columns) == 1 and len(Usual.of(rng.normal(size=(2400, 600))).columns) == 512
    flat = Usual.of(np.ones((8, 2)))  # nothing varies: what differs at all is far outside
    assert flat.unlike(np.array([[1.0, 1.0], [1.0, 1.001]])).tolist() == pytest.approx([0.0, 5e23], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: auroc([], [1.0]), "There are 0 scores inside"),
        (lambda: auroc([1.0], [np.nan, 2.0]), "There are 2 scores outside, 1 of them NaN"),
        (lambda: threshold([np.nan]), "1 of them NaN"),
        (lambda: threshold([1.0], 0.0), "The share to be kept is 0.0"),
        (lambda: threshold([1.0], 1.5), "The share to be kept is 1.5"),
    ],
)
def test_wrong_arguments_are_one_sentence(call, said):
    with pytest.raises(InputError, match=said):
        call()
