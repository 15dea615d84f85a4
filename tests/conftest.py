"""What every test runs under: eight fake CPU devices, and a cache of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

# Before JAX is imported, and for the processes that tests start: most of whose time is the compiler's.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # not through XLA_FLAGS, which those processes inherit


@pytest.fixture(autouse=True, scope="session")
def _private_cache():
    before = os.environ.get("AETHER_CACHE")
    with tempfile.TemporaryDirectory(prefix="aether-tests-") as folder:
        os.environ["AETHER_CACHE"] = folder
        # What is compiled once is kept, as the mains do it: most tests are of programs that others are of too.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/xla")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
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
        update = make_step(config, graph, loss, shapes)
        step = jax.jit(update, donate_argnums=0, out_shardings=(where, None))

        def on_mesh(state, batch):
            with jax.set_mesh(mesh):
                return step(state, batch)

        return jax.jit(init, out_shardings=where), on_mesh

    def make(config, devices=None):
        init, step = compiled(json.dumps(config.to_json()), tuple(devices or jax.devices()[:1]))
        return init(), step

    return make


def _run_processes(script: str, count: int, devices: int = 1, *, timeout: float = 30) -> list[str]:
    """Run a script in `count` processes of JAX with `devices` CPU devices each; return what they printed.

    All are killed when one fails or the time is up.

    Raises:
      AssertionError: one failed; with what all have printed.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start = (
        'import jax; jax.config.update("jax_cpu_collectives_implementation", "gloo")\n'
        f'jax.distributed.initialize("localhost:{port}", {count}, RANK)\n'
    )
    script = (start if count > 1 else "") + textwrap.dedent(script)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outs = [Path(folder) / str(rank) for rank in range(count)]
        running = []
        for rank, out in enumerate(outs):
            command = [sys.executable, "-c", script.replace("RANK", str(rank))]
            file = stack.enter_context(out.open("w"))
            running.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
            stack.callback(running[-1].wait)
            stack.callback(running[-1].kill)
        end = time.monotonic() + timeout
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        failed = [p.poll() for p in running]
        stack.close()
        texts = [out.read_text() for out in outs]
    assert failed == [0] * count, "\n".join(f"-- {i}\n{text}" for i, text in enumerate(texts))
    return texts


@pytest.fixture
def run_processes():
    """The function above."""
    return _run_processes
