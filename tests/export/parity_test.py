"""The comparison of logits, against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from aether.errors import CheckError
from aether.export.parity import compare


def test_what_is_compared():
    ours = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], [[0.3, 0.3, 0.4], [0.6, 0.2, 0.2]]], np.float32))
    theirs = ours.copy()
    theirs[1, 0] = np.log([0.4, 0.3, 0.3])
    found = compare([(ours[:1], theirs[:1]), (ours[1:], theirs[1:])])
    assert (found.inputs, found.predictions) == (2, 4)
    assert found.max_logit_difference == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert found.max_kl == pytest.approx(0.3 * math.log(3 / 4) + 0.4 * math.log(4 / 3), rel=1e-5)
    assert found.top1_agreement == 0.75 and not found.holds


def test_a_shift_of_all_logits_is_a_difference_but_no_divergence():
    ours = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    found = compare([(ours, ours + 0.5)])
    assert found.max_logit_difference == pytest.approx(0.5, rel=1e-6) and found.max_kl < 1e-6
    assert found.top1_agreement == 1.0 and not found.holds


@pytest.mark.parametrize("difference, holds", [(0.9e-4, True), (1.1e-4, False)])
def test_the_bound(difference, holds):
    ours = np.array([[1.0, 0.0]], np.float32)
    found = compare([(ours, ours + np.array([[difference, 0.0]], np.float32))])
    assert found.holds is holds and found.record()["verified"] is holds


def test_what_is_not_a_number_does_not_hold():
    ours = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    found = compare([(ours, np.array([[np.nan, 0.0], [1.0, 0.0]], np.float32)), (ours, ours)])
    assert not found.holds
    assert json.loads(json.dumps(found.record(), allow_nan=False))["max_logit_difference"] is None


def test_nothing_compared_does_not_hold():
    assert not compare([]).holds


def test_shapes_have_to_agree():
    with pytest.raises(CheckError, match=r"\(1, 3\).*\(1, 4\)"):
        compare([(np.zeros((1, 3)), np.zeros((1, 4)))])
