"""The first losses and gradient norms of a tiny run of each kind: any change of the mathematics shows here."""

import pytest

from aether.testing import tiny_batch, tiny_config

GOLDEN = {
    "aether": {"loss": [3.46831, 3.45267, 3.38995], "grad_norm": [0.71082, 0.67452, 0.83088]},
    "gpt2": {"loss": [3.48599, 3.43719, 3.46358], "grad_norm": [1.1911, 0.93889, 0.62335]},
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_first_three_steps_are_those_on_record(trainer, kind):
    config = tiny_config(kind)
    state, step = trainer(config)
    found = {"loss": [], "grad_norm": []}
    for i in range(3):
        state, metrics = step(state, tiny_batch(config, i))
        for name in found:
            found[name].append(round(float(metrics[name]), 5))
    for name, values in found.items():
        assert values == pytest.approx(GOLDEN[kind][name], rel=1e-4), (
            f"{kind} gave {name} {values}; on record is {GOLDEN[kind][name]}. If initialisation, model, loss or "
            f'optimizer changed on purpose, write "{kind}": {found} into GOLDEN of {__file__} and say in the commit '
            "what changed; if not, something broke."
        )
