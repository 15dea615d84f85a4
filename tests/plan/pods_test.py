"""AetherGPT 1.5b on three pods: it compiles, fits, and gathers no more than a layer's parameters at a time."""

import os

import pytest

from aether.chips import topology
from aether.config import build
from aether.plan import machine
from aether.plan.measure import make_plan

PODS = {"2 x v5e:16x16": dict(data=4, fsdp=64, dcn_data=2)}  # docs/plan.md has the others' numbers


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu")
    before = dict(os.environ)
    machine.prepare([])
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", PODS)
def test_a_pod_runs_the_largest_model(name):
    target = topology(name.rpartition(" ")[2], 2 if name.startswith("2 x") else 1)
    model = dict(size="1.5b", remat="full", attention_impl="plain")  # blockwise takes the compiler twice as long
    data = dict(context=1024, batch_size=target.chips)
    plan = make_plan(build(dict(model=model, data=data, mesh=PODS[name])).resolved(50257), target)
    assert plan.fits and plan.counts.cycles > 0 and not plan.warnings
    c = plan.config.model
    layer = 4 * c.width * c.width + 2 * c.width * c.hidden  # entries of its matrices
    gathers = [g for g in plan.collectives if g.kind == "all-gather"]
    whole = [g for g in gathers if g.result > 2 * layer]  # they are gathered in bfloat16
    assert {g.parameter for g in whole} <= {"head/kernel", "embed/embedding"}, whole
    once = 2 * c.layers * layer
    assert 2 * once <= sum(g.bytes for g in gathers) * 64 / 63 <= 3 * once + 2 * 2 * c.width * c.rows  # remat=full
    across = [g for g in plan.collectives if g.link == "dcn"]
    assert {g.axes for g in across} == ({("data",)} if target.slices > 1 else set())
