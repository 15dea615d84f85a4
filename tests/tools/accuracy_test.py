"""Every ⵟ layer within its bound of the formula in float64: a part of the table that `tools.accuracy` prints."""

import numpy as np
import pytest

from tools.accuracy import measure
from tools.accuracy_cases import cases

CASES = list(cases())
PARTS = 4
DRAWN = np.random.default_rng(0).permutation(len(CASES))[:64]  # the whole table takes minutes


def test_the_table_has_all_layers_and_at_least_200_cases():
    assert len(CASES) >= 200
    assert len({case.name + case.dtype for case in CASES}) == len(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_outputs_and_gradients_are_within_their_bounds(part):
    for case in (CASES[i] for i in DRAWN[part::PARTS]):
        kappa, errors = measure(case)
        assert kappa >= 1 and np.isfinite(kappa)
        assert {e.of for e in errors} == {"y", *case.values}
        for error in errors:
            assert error.share <= 1, (case.name, case.dtype, error)


def test_a_wrong_layer_exceeds_its_bound():
    case = next(c for c in CASES if c.dtype == "float32")
    wrong = case._replace(run=lambda values: case.run(values) * (1 + 1e-3))
    assert all(error.share > 1 for error in measure(wrong)[1])
