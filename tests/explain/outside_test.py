"""Scores and what they are worth, recomputed from what was measured."""

from functools import cache

import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain import nearness, outside
from aether.explain.nearness import NEAR
from aether.explain.outside import Detector, abstaining, tell
from aether.testing import drawn_state, inputs_of, network_config

MANY = 48


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """Let all that is asked of one network be asked of one program, for 8 texts or 6 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearness, "_PLACES", 16 * 8 * 12)
        patch.setattr(outside, "measuring", measure)
        yield


@cache
def measure(model):
    """Return what measures inputs of a network, the same for all tests."""
    return nearness.measuring(model)


@cache
def case(network):
    """Return a network, inputs of one kind and of another."""
    config = network_config(network)
    x = inputs_of(config, MANY)
    other = x[:20, ::-1] // 3 if x.ndim == 2 else 2 + np.sort(x[:20], 1)
    return nnx.merge(*drawn_state(config)), x, np.ascontiguousarray(other)


def unlike(rows, usual):
    """Return the Mahalanobis distances of rows by as many columns as 24 usual rows allow, 6 of them."""
    columns = np.linspace(0, usual.shape[1] - 1, 6).round().astype(int)
    rows, usual = rows[:, columns].astype(np.float64), usual[:, columns].astype(np.float64)
    off = usual - usual.mean(0)
    covariance = off.T @ off / len(usual)
    covariance += 1e-6 * np.trace(covariance) / 6 * np.eye(6)
    off = rows - usual.mean(0)
    return np.sum(off * np.linalg.solve(covariance, off.T).T, -1) / 6


@pytest.mark.parametrize("network", ["aether_resnet", "aether"])
def test_scores_are_made_of_what_was_measured(network):
    model, x, _ = case(network)
    detector, usual, measured = Detector(model, x[:24]), measure(model)(x[:24]), measure(model)(x[24:])
    found = detector(x[24:])
    np.testing.assert_allclose(found["confidence"], -measured.sure.confidence, rtol=1e-5)
    np.testing.assert_allclose(found["energy"], measured.sure.energy, rtol=1e-5)
    assert ("nll" in found) == (x.ndim == 2) and ("profile" in found) == bool(measured.near)
    assert detector.best == ("nll" if x.ndim == 2 else "profile")
    for name in ("profile", "units", "stream"):
        layers = getattr(measured, name)
        each = [unlike(rows, getattr(usual, name)[layer]) for layer, rows in layers.items()]
        for layer, wanted in zip(layers, each, strict=True):
            np.testing.assert_allclose(found[f"{name}:{layer}"], wanted, rtol=1e-2)
        if layers:
            np.testing.assert_allclose(found[name], np.mean(each, 0), rtol=1e-2)
    for name in NEAR if measured.near else ():
        pairs = {k: (usual.near[k][name].astype(np.float64), measured.near[k][name]) for k in measured.near}
        each = {k: (b - a.mean()) / a.std() for k, (a, b) in pairs.items()}
        for layer, wanted in each.items():
            np.testing.assert_allclose(found[f"{name}:{layer}"], wanted, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(found[name], np.mean(list(each.values()), 0), rtol=1e-2, atol=1e-3)


def share_above(inside, outside):
    return np.mean([(o > i) + 0.5 * (o == i) for i in inside for o in outside])


@pytest.mark.parametrize("given", [True, False], ids=["usual given", "usual by thirds"])
@pytest.mark.parametrize("network", ["aether_resnet", "resnet", "aether"])
def test_what_is_told(network, given):
    model, x, other = case(network)
    labels = np.arange(MANY) % 5 if network == "aether_resnet" else None
    told = tell(model, x, {"other": other, "same": x[:8]}, labels, usual=x if given else None, kept=0.75)
    start, step = (0, 2) if given else (1, 3)
    choosing, tested = x[start::step], x[start + 1 :: step]
    detector = Detector(model, x if given else x[::3])
    inside, outside, chose = detector(tested), detector(other), detector(choosing)
    measured = measure(model)(tested).sure
    if network != "resnet":
        right = measured.guess == (labels[start + 1 :: step, None] if x.ndim == 4 else tested[:, 1:])
        assert told.accuracy == right.mean() and 0 < told.calibration_error < 1
    else:
        assert told.accuracy is None is told.calibration_error and set(told.accuracy_kept.values()) == {None}
    assert list(told.scores) == list(inside) and told.best == detector.best
    for name, a in inside.items():
        np.testing.assert_allclose(told.scores[name], a, rtol=1e-3, atol=1e-4)
        a, most = told.scores[name], told.thresholds[name]
        assert most == pytest.approx(np.sort(chose[name])[int(np.ceil(0.75 * len(choosing))) - 1], rel=1e-2, abs=1e-3)
        np.testing.assert_allclose(told.outside["other"][name], outside[name], rtol=1e-2, atol=1e-3)
        assert told.auroc["other"][name] == pytest.approx(share_above(a, told.outside["other"][name]))
        assert told.refused[""][name] == np.mean(a > most)
        assert told.refused["other"][name] == np.mean(told.outside["other"][name] > most)
        if network != "resnet":
            assert told.accuracy_kept[name] == pytest.approx(right[a <= most].mean())
    assert told.best == dict(aether_resnet="profile", resnet="stream", aether="nll")[network]
    if network != "aether":
        assert told.auroc["other"][told.best] > 0.8 > told.auroc["same"][told.best]


def test_abstaining():
    model, x, other = case("aether_resnet")
    detector = Detector(model, x[:24])
    for by in ("", "confidence"):
        abstains = abstaining(detector, x[24:], 0.9, by)
        scores, most = detector(x[24:])[by or "profile"], np.sort(detector(x[24:])[by or "profile"])[21]
        assert np.sum(abstains(x[24:])) == 2 and (abstains(x[24:]) == (scores > most)).all()
    assert abstaining(detector, x[24:], 0.9)(other).mean() > 0.5


def test_wrong_arguments_are_one_sentence():
    model, x, _ = case("resnet")
    for call, said in (
        (lambda: tell(model, x[:2], {}), "There are 2 inputs inside; give 3 at least"),
        (lambda: tell(model, x, {}, np.zeros(3)), "There are 48 inputs inside and 3 labels"),
        (
            lambda: tell(model, x, {"more": x[:, 1:]}),
            r"more has inputs \(15, 16, 3\) and those inside are \(16, 16, 3\)",
        ),
        (lambda: abstaining(Detector(model, x[:24]), x, by="profile"), "by is 'profile'; the scores are confidence"),
    ):
        with pytest.raises(InputError, match=said):
            call()
