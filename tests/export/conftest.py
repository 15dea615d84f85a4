"""What the tests of exports share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import Pictures
from aether.data.images.load import Labels
from aether.data.tokenizers import chars_tokenizer
from aether.export.bundle import facts_of, parameters_of
from aether.export.source import DTYPES, Source
from aether.export.targets import find
from aether.export.write import network, write_files
from aether.testing import drawn_state, inputs_of, network_config, tiny_run
from aether.train.loop import train


@functools.cache
def _forward(name, dtype):
    """Return Aether's logits as a function of inputs: compiled once, however many targets are compared with them."""
    config = network_config(name)
    graph, state = drawn_state(config)
    rounded = jax.tree.map(lambda a: a.astype(DTYPES[dtype]).astype(jnp.float32), state)
    compiled = jax.jit(lambda state, x: network(config, nnx.merge(graph, state), x))
    return lambda x: np.asarray(compiled(rounded, x))


@pytest.fixture(scope="session")
def aether():
    """Return aether(name, dtype) -> the logits of a network of `written` as a function of inputs."""
    return lambda name, dtype="float32": _forward(name, dtype)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Return write(name, target, dtype) -> the folder of an export, made once: not to be changed.

    The network is one of `aether.testing.NETWORKS`, with random parameters that are nowhere near zero.
    """

    @functools.cache
    def write(name, target, dtype="float32"):
        config = network_config(name)
        folder = tmp_path_factory.mktemp(f"{name}_{target}_{dtype}")
        write_files(_source(config, drawn_state(config)[1], dtype), find(target), folder)
        return folder

    return write


@pytest.fixture(scope="session")
def finished(written):
    """Return finish(name, target, dtype) -> the folder of `written`, finished in this process, once."""

    @functools.cache
    def finish(name, target, dtype):
        folder = written(name, target, dtype)
        if (finishing := find(target).finish) is not None:
            finishing(folder)
        return folder

    return finish


@pytest.fixture
def exported(finished):
    """Return export(name, target, dtype) -> folder, inputs, Aether's logits, those of the export, run in this process.

    Networks and folders are those of `written`.
    """

    def export(name, target, dtype="float32"):
        folder = finished(name, target, dtype)
        x = inputs_of(network_config(name))
        wanted = _forward(name, dtype)(x)
        (got,) = find(target).replay(folder, [x])
        return folder, x, wanted, got

    return export


def _source(config, state, dtype):
    """Make what a target is written from, with as short a record as there can be."""
    record = dict(config=config.to_json(), step=0, dtype=dtype, average="none", license="unknown", parameters=0)
    record |= dict(seen={}, results={})
    facts, parameters = facts_of(config), parameters_of(config, state, dtype)
    if config.model.task != "classify":
        return Source(facts, parameters, dtype, chars_tokenizer("abcdefghijklmnopqrstuvwxyz .,'\n"), None, record)
    i = config.image
    names = tuple("abcde"[: config.model.classes])
    return Source(
        facts, parameters, dtype, None, Labels(names, Pictures(len(names), i.size, i.channels, i.mean, i.std)), record
    )


@pytest.fixture
def source_of():
    """Return source(name) of one of the same networks, as targets are written from."""

    def source(name):
        config = network_config(name)
        return _source(config, drawn_state(config)[1], "float32")

    return source


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return trained(kind) -> the folder of a run of 30 steps, made once: tiny, but it has learned something."""

    @functools.cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        train(tiny_run(kind, folder), str(folder / "run"))
        return folder / "run"

    return run
