"""What every test runs under: eight fake CPU devices, and a cache of its own."""

import json
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


@pytest.fixture(scope="session")
def trainer():
    """A function (config, devices) -> (state, step): a fresh sharded state and the jitted, donating step.

    Equal configs share what was compiled: to compile a step takes seconds, to run it a millisecond.
    """
    from functools import cache, partial

    from flax import nnx

    from aether.config import build
    from aether.losses import LOSSES
    from aether.parallel import make_mesh, shardings
    from aether.testing import tiny_model
    from aether.train.step import init_state, make_step

    @cache
    def compiled(text, devices):
        config = build(json.loads(text))
        graph, shapes = nnx.split(nnx.eval_shape(lambda: tiny_model(config)))
        init = lambda: init_state(config, nnx.state(tiny_model(config)))  # noqa: E731
        mesh = make_mesh(config.mesh, list(devices))
        where = shardings(jax.eval_shape(init), mesh, config.mesh)
        loss = partial(LOSSES["lm"], chunk=config.train.loss_chunk, z_loss=config.train.z_loss)
        fast = {"xla_backend_optimization_level": 0} if len(devices) > 1 else None  # halves the time to compile
        update = make_step(config, graph, loss, shapes)
        step = jax.jit(update, donate_argnums=0, out_shardings=(where, None), compiler_options=fast)

        def on_mesh(state, batch):
            with jax.set_mesh(mesh):
                return step(state, batch)

        return jax.jit(init, out_shardings=where, compiler_options=fast), on_mesh

    def make(config, devices=None):
        init, step = compiled(json.dumps(config.to_json()), tuple(devices or jax.devices()[:1]))
        return init(), step

    return make
