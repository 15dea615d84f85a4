"""What a search tries, leaves out and keeps, with plans made up."""

import dataclasses
from collections import Counter

import jax

from aether.chips import CHIPS, topology
from aether.config import MeshConfig, Pictures, build
from aether.plan.measure import Plan
from aether.plan.memory import Memory
from aether.plan.roofline import Roofline
from aether.plan.search import IMAGES, Search, candidates, meshes, search
from aether.testing import tiny_config

TARGET = topology("h100:8")


def fake(config, total, rate):
    times = Roofline(compute=config.data.batch_size * config.data.context / rate, hbm=0, ici=0, dcn=0, cycles=None)
    memory = Memory(0, 0, total, 0, 0)
    return Plan(config, TARGET, {}, memory, total <= TARGET.chip.usable, 1.0, 1, roofline=times)


def test_every_factoring_of_the_devices_is_a_mesh():
    found = [(m.data, m.fsdp, m.tensor) for m in meshes(MeshConfig(), 8)]
    assert len(set(found)) == len(found) == 10 and all(a * b * c == 8 for a, b, c in found)


def test_what_cannot_divide_or_fit_is_left_out_before_compiling(monkeypatch):
    pruned = Counter()
    found = list(candidates(tiny_config(), TARGET, jax.devices(), pruned))
    assert pruned["meshes that do not divide"] == 1  # four heads over eight
    assert {c.config.model.remat for c in found} == {"none", "dots", "full", "offload"}
    ways = [c.config.mesh.data * c.config.mesh.fsdp for c in found]
    assert all(c.config.data.batch_size == c.rows * n for c, n in zip(found, ways, strict=True))
    assert found[0].config.mesh.tensor == found[0].config.mesh.fsdp == 1 and found[0].rows == 64

    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(TARGET.chip, hbm=30_000))
    pruned = Counter()
    tight = list(candidates(tiny_config(), TARGET, jax.devices(), pruned))
    assert pruned["meshes whose state does not fit"] > 0 and pruned["state and activations do not fit"] > 0
    assert len(tight) < len(found)


def test_images_have_patches_for_tokens_or_layers_that_promise_nothing():
    sizes = []
    for kind, more in (("aether_vit", dict(layers=3, heads=2, width=8, patch=4)), ("resnet", dict(stages="1,1"))):
        config = build(dict(model=dict(kind=kind, **more))).resolved(0, Pictures(10, 16, 3, 0.5, 0.25))
        found = list(candidates(config, TARGET, jax.devices(), Counter(), fixed_batch=False))
        assert {c.rows for c in found} == set(IMAGES)
        sizes.append({c.least // c.rows for c in found if c.place.tensor == 1 and c.config.model.remat == "full"})
    assert sizes == [{3 * 16 * 4 * 8}, {0}]


def test_the_frontier_is_not_beaten_in_both():
    config = tiny_config()
    plans = [fake(config, total, rate) for total, rate in [(50, 10), (60, 10), (40, 9), (45, 8), (30, 3), (10**12, 99)]]
    frontier = Search(plans).frontier()
    assert [(p.memory.total, round(p.rate_bound)) for p in frontier] == [(50, 10), (40, 9), (30, 3)]


def test_what_keeps_more_than_a_refused_one_is_not_compiled():
    tried, told = [], []

    def measure(config, target, devices):
        tried.append(config)
        fits = config.data.batch_size <= 8 * 4 and config.model.remat != "none"
        return fake(config, 1 if fits else 10**12, 10)

    found = search(tiny_config(), TARGET, 1e6, told.append, measure=measure)
    place = MeshConfig(data=8, fsdp=1, tensor=1)
    sizes = [(c.data.batch_size // 8, c.model.remat) for c in tried if c.mesh == place]
    assert (64, "offload") in sizes and (64, "none") in sizes  # none comes first, and says nothing of offload
    assert (32, "none") in sizes and sizes.count((64, "none")) == 1
    assert (
        sum(found.pruned.values()) + len(tried)
        == len(list(candidates(tiny_config(), TARGET, jax.devices(), Counter()))) + 1
    )
    assert "left" in told[1]


def test_time_is_kept():
    now = [0.0]

    def measure(config, target, devices):
        now[0] += 10.0
        return fake(config, 1, 10)

    found = search(tiny_config(), TARGET, 35.0, lambda text: None, measure=measure, clock=lambda: now[0])
    assert len(found.plans) == 3 and found.pruned["not reached in time"] > 100
