"""The step that is timed is the trainer's: as the plan counts it, with the state donated."""

from types import SimpleNamespace

import jax
import numpy as np

from aether import parallel
from aether.chips import topology
from aether.config import MeshConfig
from aether.plan.measure import make_plan
from aether.testing import tiny_config
from tools import bench_step
from tools.bench_compare import said_of


def test_configs_are_those_of_the_files_with_both_models():
    args = SimpleNamespace(config="", override=["model.remat=dots", "data.batch_size=4"], batch=2, context=64)
    gpt2, aether = (bench_step.config_of(kind, "124m", args) for kind in ("gpt2", "aether"))
    assert (gpt2.model.kind, aether.model.kind) == ("gpt2", "aether")
    for c in (gpt2, aether):
        assert (c.model.size, c.model.layers, c.model.vocab, c.model.remat) == ("124m", 12, 50257, "dots")
        assert (c.data.batch_size, c.data.context, c.train.accumulate) == (4, 64, 1)  # what is typed has the last word
    tiny = bench_step.config_of("gpt2", "tiny", SimpleNamespace(config="", override=[], batch=0, context=0))
    assert (tiny.data.batch_size, tiny.data.context, tiny.model.vocab) == (8, 128, 257)


def test_the_step_is_the_one_of_the_plan_and_moves():
    config = tiny_config(model=dict(layers=1))
    device = jax.devices("cpu")[0]
    program = bench_step.compiled(config, parallel.make_mesh(MeshConfig(), [device]))
    said = said_of(program.compiled, False)
    plan = make_plan(config, topology("h100:1"), [device])
    assert said["flops"] == plan.counts.flops > 0
    assert program.saved > program.beside > 0
    call = program.start()
    losses = [float(call()[1]["loss"]) for _ in range(20)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1  # the same batch again and again
    assert program.more(2.0) == dict(tokens_per_second=config.data.batch_size * config.data.context / 2e-3, mfu=None)
