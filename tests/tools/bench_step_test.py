"""The step that is timed is the trainer's: as the plan counts it, with the state donated."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from aether import parallel
from aether.chips import topology
from aether.config import KINDS, MeshConfig, Pictures, build
from aether.config.kinds import BASELINES
from aether.losses import loss_of
from aether.plan.measure import make_plan
from aether.testing import tiny_config
from aether.train.setup import batch_shapes, describe_state
from tools import bench_step
from tools.bench_compare import said_of, saved_bytes

PICTURES = Pictures(classes=7, size=8, channels=3, mean=0.5, std=0.25)


def said(**flags):
    return SimpleNamespace(**(dict(config="", sizes=[], override=[], batch=0, context=0) | flags))


def image_config(kind, **model):
    return build(dict(model=dict(kind=kind, dtype="float32", **model), data=dict(batch_size=8))).resolved(0, PICTURES)


def test_configs_are_those_of_the_files_with_both_models():
    args = said(override=["model.remat=dots", "data.batch_size=4"], batch=2, context=64)
    both = bench_step.pair("124m", args)
    assert list(both) == ["gpt2", "aether"] == [c.model.kind for c in both.values()]
    for c in both.values():
        assert (c.model.size, c.model.layers, c.model.vocab, c.model.remat) == ("124m", 12, 50257, "dots")
        assert (c.data.batch_size, c.data.context, c.train.accumulate) == (4, 64, 1)  # what is typed has the last word
    tiny = bench_step.pair("tiny", said())["gpt2"]
    assert (tiny.data.batch_size, tiny.data.context, tiny.model.vocab) == (8, 128, 257)


@pytest.mark.parametrize("more", [[], ["model.kind=resnet"]])
def test_a_config_brings_its_own_family(more):
    form = ["image.size=28", "image.channels=1", "model.classes=10", "model.spherical=false", *more]
    args = said(config="configs/fashion_mnist.py", override=form)
    ((title, contenders),) = bench_step.tables(args, SimpleNamespace(on_cpu=True))
    assert title == "step: fashion_mnist, batch 128 x 28 x 28 x 1, float32"
    assert [c.name for c in contenders] == ["ResNet", "AetherResNet"]
    both = bench_step.pair("", said(config="configs/fashion_mnist.py", override=form, batch=16))
    assert {k: (c.model.kind, c.data.batch_size) for k, c in both.items()} == {k: (k, 16) for k in both}
    assert not both["aether_resnet"].model.spherical


def test_every_kind_has_a_name_and_one_partner():
    assert set(bench_step.NAMES) == set(KINDS) == set(BASELINES) | set(BASELINES.values())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit", "resnet"])
def test_batches_are_random_and_of_the_trainers_shapes(kind):
    images = kind in ("vit", "resnet")
    config = image_config(kind) if images else tiny_config(kind)
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    batch = bench_step.random_batch(config, mesh)
    shapes = batch_shapes(config, mesh)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s.shape, s.dtype) for k, s in shapes.items()}
    below = dict(images=256, labels=7) if images else dict(tokens=32, targets=32)
    for name, high in below.items():
        if name in batch:
            values = np.asarray(batch[name])
            assert len(np.unique(values)) > 3 and 0 <= values.min() and high // 2 < values.max() < high
    assert np.asarray(batch["mask"]).all()
    if "positions" in batch:
        assert (np.asarray(batch["positions"]) == np.arange(batch["positions"].shape[1])).all()


@pytest.mark.slow
def test_of_a_network_with_statistics_the_training_is_measured():
    """They move from step to step, and what is kept is what the gradient through them needs."""
    config = image_config("resnet", stages="1", width=4)
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    program = bench_step.compiled(config, mesh)
    graph, _, like = describe_state(config, mesh)

    def fixed(params, extras, batch):
        return loss_of(config)(nnx.merge(graph, params, extras), batch, None)[0]

    assert program.saved > saved_bytes(fixed, like.params, like.extras, batch_shapes(config, mesh))
    call, means = program.start(), []
    for _ in range(2):
        state, metrics = call()
        assert np.isfinite(float(metrics["loss"]))
        means.append(np.array(state.extras["stem"]["norm"]["mean"][...]))
    assert np.abs(means[0]).min() > 0 and np.abs(means[1] - means[0]).min() > 0
    assert program.more(2.0) == dict(images_per_second=8 / 2e-3, mfu=None)


@pytest.mark.slow
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
