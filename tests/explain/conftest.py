"""What tests of `aether.explain` share."""

import pytest
from flax import nnx

from aether.testing import drawn_state, network_config


@pytest.fixture(scope="module")
def model():
    """Return model(name) -> a network, drawn once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = nnx.merge(*drawn_state(network_config(name)))
        return made[name]

    return get
