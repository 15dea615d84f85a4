"""One pass over data for all layers against a pass for each; single layers are in `prototypes_test`."""

import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain import survey as module
from aether.explain.layers import layers_of
from aether.explain.prototypes import KINDS
from aether.explain.survey import nearest_inputs, silent_units, survey
from aether.testing import drawn_state, inputs_of, network_config


def drawn(name):
    config = network_config(name)
    return nnx.merge(*drawn_state(config)), np.asarray(inputs_of(config, 5))


@pytest.mark.parametrize("name", ["aether", "aether_resnet", "aether_vit"])
def test_a_survey_is_every_layers_own_search(name):
    model, x = drawn(name)
    found = survey(model, [x[:2], x[2:]], 3, length=4)
    assert list(found) == [layer for layer, one in layers_of(model).items() if isinstance(one, KINDS)]
    for layer, one in list(found.items())[-2:]:
        alone, silent = nearest_inputs(model, layer, [x], 3, length=4), silent_units(model, layer, [x])
        assert (one.nearest.rows == alone.rows).all() and (one.nearest.places == alone.places).all()
        np.testing.assert_allclose(one.nearest.values, alone.values, rtol=1e-5)
        np.testing.assert_allclose(one.responses.largest, silent.largest, rtol=1e-5)
        assert one.nearest.among * len(x) == len(x) * alone.among > 0
        if x.ndim == 2:
            assert (one.nearest.contexts == alone.contexts).all()


def test_a_survey_runs_the_network_once_for_each_batch(monkeypatch):
    model, x = drawn("aether")
    calls = []

    def counting(model):
        watch = watching(model)
        return lambda x: calls.append(len(x)) or watch(x)

    watching = module.watching
    monkeypatch.setattr(module, "watching", counting)
    survey(model, [x[:2], x[2:]], 3)
    assert calls == [2, 3]


@pytest.mark.parametrize(
    "name, batches, m, words",
    [("aether", [], 3, "There is no input"), ("aether", None, 0, "m above 0"), ("gpt2", None, 3, "no ⵟ units")],
)
def test_what_cannot_be_surveyed_is_told(name, batches, m, words):
    model, x = drawn(name)
    with pytest.raises(InputError, match=words):
        survey(model, [x] if batches is None else batches, m)
