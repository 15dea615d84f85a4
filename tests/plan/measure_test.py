"""Whole plans: programs of the real TPU compiler whose contents are known, and of the CPU's in place of GPUs."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aether.chips import topology
from aether.config import Pictures, build
from aether.errors import InputError
from aether.plan import machine
from aether.plan.collectives import collectives
from aether.plan.counts import count
from aether.plan.layout import Layout
from aether.plan.measure import make_plan, resolved, vocabulary
from aether.plan.read import parse
from aether.plan.report import search_text, to_json, to_text
from aether.plan.scaling import row
from aether.plan.search import Search
from aether.testing import tiny_config

KEYS = {
    "fits",
    "hbm_bytes",
    "flops",
    "cycles",
    "collectives",
    "mfu_bound",
    "tokens_per_second_bound",
    "compile_seconds",
}


@pytest.fixture(scope="module")
def tpus():
    """Four TPUs of a slice, for the compiler."""
    pytest.importorskip("libtpu")
    before = dict(os.environ)
    machine.prepare([topology("v5e:2x2")])
    yield machine.devices_of(topology("v5e:2x2"))
    os.environ.clear()
    os.environ.update(before)


def program(function, *shapes):
    return parse(jax.jit(function).lower(*shapes).compile().as_text())


def test_the_tpu_compilers_collectives_are_those_written(tpus):
    mesh = Mesh(np.array(tpus).reshape(2, 2), ("data", "fsdp"))
    rows, both = PartitionSpec("data"), PartitionSpec("data", "fsdp")

    def body(x):
        y = jax.lax.all_gather(x, "fsdp", axis=1, tiled=True)
        y = jax.lax.fori_loop(0, 5, lambda _, c: jax.lax.psum(jnp.sin(c), "data"), y)
        return jax.lax.ppermute(y, "data", [(0, 1), (1, 0)])

    function = jax.shard_map(body, mesh=mesh, in_specs=both, out_specs=rows, check_vma=False)
    shape = jax.ShapeDtypeStruct((2048, 1024), "float32", sharding=NamedSharding(mesh, both))
    module = program(function, shape)
    found = {(c.kind, c.axes): c for c in collectives(module, Layout({"data": 2, "fsdp": 2}, (0,) * 4))}
    block = 1024 * 1024 * 4
    assert set(found) == {("all-gather", ("fsdp",)), ("all-reduce", ("data",)), ("collective-permute", ("data",))}
    gather, reduce, permute = (found[k] for k in sorted(found))
    assert (gather.count, gather.operand, gather.result, gather.bytes) == (1, block // 2, block, block // 2)
    assert (reduce.count, reduce.in_loop, reduce.bytes) == (5, True, 5 * block)
    assert (permute.count, permute.bytes) == (1, block)
    assert module.warnings == []


def test_a_loop_counts_as_much_as_its_body_written_out(tpus):
    layers, rows, width = 4, 2048, 2048
    one = NamedSharding(Mesh(np.array(tpus[:1]), ("x",)), PartitionSpec())
    weights = jax.ShapeDtypeStruct((layers, width, width), "bfloat16", sharding=one)
    x = jax.ShapeDtypeStruct((rows, width), "bfloat16", sharding=one)

    def run(unroll, weights, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights, unroll=unroll)[0]

    looped, flat = (count(program(lambda w, x, u=u: run(u, w, x), weights, x)) for u in (1, layers))
    assert looped.flops == flat.flops == 2 * layers * rows * width * width
    # The loop cuts each matrix out of the stack first, and tiles otherwise; one trip alone would be less than flat.
    assert flat.cycles <= looped.cycles <= 2 * flat.cycles


@pytest.fixture(scope="module")
def gpus():
    """A plan of the tiny model on eight GPUs in two nodes' worth of mesh."""
    config = tiny_config(mesh=dict(data=2, fsdp=4), data=dict(batch_size=64, context=128))
    return make_plan(config, topology("h100:8"))


def test_gpus_are_planned_by_data_sheet(gpus):
    assert gpus.fits and gpus.counts.cycles is None and gpus.roofline.hbm == 0
    assert any("data sheet" in w for w in gpus.warnings)
    expected = gpus.model_flops / 8
    assert gpus.counts.flops == pytest.approx(expected, rel=0.5)  # it is narrow: the rest weighs, too
    assert gpus.mfu_bound == pytest.approx(gpus.rate_bound * gpus.model_flops / gpus.config.per_step / (8 * 989e12))
    assert {c.kind for c in gpus.collectives} >= {"all-gather"} and {c.link for c in gpus.collectives} == {"ici"}
    assert all(set(c.axes) <= {"data", "fsdp"} for c in gpus.collectives)


def test_the_json_has_its_keys_and_adds_up(gpus):
    said = json.loads(json.dumps(to_json(gpus)))
    assert set(said) >= KEYS and set(said["hbm_bytes"]) >= {"parameters", "optimizer", "activations", "total"}
    assert sum(v for k, v in said["hbm_bytes"].items() if k != "total") == said["hbm_bytes"]["total"]
    assert said["cycles"] is None and said["chips"] == 8 and said["mesh"]["fsdp"] == 4
    assert set(said["collectives"][0]) >= {"kind", "axes", "link", "bytes", "count", "in_loop", "source"}


def test_the_text_fits_a_terminal(gpus):
    text = to_text(gpus)
    assert text.splitlines()[3].startswith("FITS") and max(len(line) for line in text.splitlines()) <= 100


def test_a_plan_of_images_counts_images():
    model = dict(kind="aether_resnet", stages="1,1", width=8, dtype="float32")
    config = build(dict(model=model, data=dict(batch_size=32))).resolved(0, Pictures(10, 8, 3, 0.5, 0.25))
    plan = make_plan(config, topology("h100:4"), jax.devices()[:4])
    said, text = json.loads(json.dumps(to_json(plan))), to_text(plan)
    assert said["images_per_second_bound"] == plan.rate_bound and said["image_size"] == 8
    assert said["model_flops_per_image"] == plan.model_flops // 32 and not {"context", "vocab"} & set(said)
    # the formula has the zeros of the padding and a gradient by the images, the program has neither
    assert 1.0 < plan.model_flops / (4 * plan.counts.flops) < 1.4
    for part in ("aether_resnet 18, stages 1,1, 10 classes", "batch 32 x 8 x 8 pixels", "images/s"):
        assert part in text
    assert row(plan)["images_per_chip"] == 8 and "token" not in text + json.dumps([said, row(plan)])
    table = search_text(Search([plan])).splitlines()
    assert "images/s" in table[0] and f"{plan.rate_bound:,.0f}" in table[1]


@pytest.mark.parametrize("known", [dict(size=8), dict()])
def test_what_pictures_leave_open_is_asked_for(known):
    with pytest.raises(InputError, match="needs both, as in --config.image.size=224"):
        resolved(build(dict(model=dict(kind="vit"), image=known)), 0 if known else 10)


@pytest.mark.slow
def test_a_scanned_model_counts_as_an_unrolled_one(tpus):
    """A loop body counted once would be off by the number of layers."""

    def plan(scan):
        model = dict(layers=4, heads=4, width=256, scan_layers=scan, attention_impl="blockwise")
        values = dict(model=model, data=dict(context=512, batch_size=16), mesh=dict(data=2, fsdp=2))
        return make_plan(build(values).resolved(1024), topology("v5e:2x2"))

    scanned, unrolled = plan(True), plan(False)
    assert scanned.counts.flops == pytest.approx(unrolled.counts.flops, rel=0.1)
    assert scanned.counts.cycles == pytest.approx(unrolled.counts.cycles, rel=0.3)
    assert scanned.counts.flops == pytest.approx(scanned.model_flops / 4, rel=0.02)


@pytest.mark.slow
def test_what_the_compiler_refuses_does_not_fit(tpus):
    model = dict(size="tiny", attention_impl="plain")  # whole scores
    values = dict(model=model, data=dict(context=2048, batch_size=64))
    plan = make_plan(build(values).resolved(257), topology("v5e:1x1"))
    assert not plan.fits and plan.memory.total > topology("v5e:1x1").chip.usable and plan.mfu_bound is None
    said = json.loads(json.dumps(to_json(plan)))
    assert said["flops"] is None and said["collectives"] == [] and "DOES NOT FIT" in to_text(plan)


@pytest.mark.parametrize(
    ("tokenizer", "model_vocab", "given", "ids"),
    [("bytes", 0, 0, 257), ("gpt2:", 0, 0, 50257), ("chars", 0, 65, 65), ("chars", 70, 0, 70)],
)
def test_the_vocabulary_is_given_or_known(tokenizer, model_vocab, given, ids):
    config = build(dict(data=dict(tokenizer=tokenizer), model=dict(vocab=model_vocab)))
    assert vocabulary(config, given) == ids


def test_an_unknown_vocabulary_is_asked_for():
    with pytest.raises(InputError, match="--vocab"):
        vocabulary(build(dict(data=dict(tokenizer="chars"))))


def test_too_few_devices_and_too_many_gpus_are_told():
    with pytest.raises(InputError, match="JAX_NUM_CPU_DEVICES"):
        machine.devices_of(topology("h100:16"))
    with pytest.raises(InputError, match="at most 64"):
        machine.prepare([topology("h100:128")])
