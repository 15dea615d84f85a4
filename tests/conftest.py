"""What every test runs under: eight fake CPU devices, and a cache of its own."""

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


@pytest.fixture
def trainer():
    """A function (config, devices) -> (state, step): a fresh sharded state and the jitted, donating step."""
    from functools import partial

    from flax import nnx

    from aether.losses import LOSSES
    from aether.parallel import make_mesh, shardings
    from aether.testing import tiny_model
    from aether.train.step import init_state, make_step

    def make(config, devices=None, model=None):
        graph, params = nnx.split(model or tiny_model(config))
        state = init_state(config, params)
        mesh = make_mesh(config.mesh, devices or jax.devices()[:1])
        where = shardings(state, mesh)
        loss = partial(LOSSES["lm"], chunk=config.train.loss_chunk, z_loss=config.train.z_loss)
        step = jax.jit(make_step(config, graph, loss, params), donate_argnums=0, out_shardings=(where, None))
        return jax.device_put(state, where), step

    return make
