"""The row of a look against a step, on a network of width 16."""

import dataclasses

import jax
import pytest

from aether.testing import network_config
from tools.bench_telemetry import EVERY, row
from tools.bench_where import Where


@pytest.mark.slow
def test_a_look_is_counted_and_timed_beside_a_step():
    base = network_config("aether")
    train = dataclasses.replace(base.train, telemetry_every=EVERY, telemetry_rows=2)
    found = row(dataclasses.replace(base, train=train), Where(jax.devices()[0], None, 2**30), 1)
    assert (found["batch"], found["rows"]) == (4, 2)
    assert 0.1 < found["flops"] < 0.9, "half the rows, forward, and a product a layer for the numbers"
    assert found["step_ms"] > 0 and found["look_ms"] > 0 and found["share"] == found["ratio"] / EVERY
