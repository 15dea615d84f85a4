"""What every test runs under: eight fake CPU devices, strict promotion where we can, and a cache of its own."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, and for the processes that tests start

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # not through XLA_FLAGS, which those processes would inherit


@pytest.fixture(autouse=True, scope="session")
def _private_cache():
    before = os.environ.get("AETHER_CACHE")
    with tempfile.TemporaryDirectory(prefix="aether-tests-") as folder:
        os.environ["AETHER_CACHE"] = folder
        yield
    os.environ.pop("AETHER_CACHE")
    if before is not None:
        os.environ["AETHER_CACHE"] = before


@pytest.fixture
def rng():
    """A NumPy generator that starts the same in every test."""
    return np.random.default_rng(0)
