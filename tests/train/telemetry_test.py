"""Telemetry in a run: which steps, what numbers, what a restart keeps, and that training does not notice."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from aether import parallel
from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig, MeshConfig, build
from aether.data.corpus import load_corpus
from aether.data.loader import train_batches
from aether.explain.telemetry import telemetry
from aether.losses import loss_of
from aether.parallel import make_mesh
from aether.testing import drawn_state, inputs_of, network_config, tiny_text
from aether.train.loop import train
from aether.train.setup import batch_shapes, describe_state
from aether.train.step import init_state
from aether.train.units import Units
from tests.train.report_test import events

LAYERS = ["blocks.0.attention", "blocks.0.mlp.hidden"]


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """settings(**train) is the config of five steps of one layer, dropout on, saved after every second."""
    text = tiny_text(tmp_path_factory.mktemp("text"), 600)

    def make(**changes):
        return build(
            dict(
                model=dict(layers=1, heads=2, width=16, vocab=258, dtype="float32", dropout=0.1),
                data=dict(path=str(text), context=16, batch_size=8),
                optim=dict(learning_rate=1e-2, warmup_steps=2, schedule_steps=5),
                train=dict(steps=5, eval_every=0, eval_batches=1, sample_tokens=0, ema=0.6) | changes,
                checkpoint=dict(every=2, keep_last=100),
            )
        )

    return make


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    config = settings(telemetry_every=2, telemetry_rows=3)
    train(config, str(folder))
    return config, folder


def lines(folder, name="telemetry.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def restored(config, folder, step):
    """The resolved config, graph and state of a checkpoint."""
    config = config.resolved(load_corpus(config.data).tokenizer.vocab_size)
    graph, _, like = describe_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return config, graph, Checkpoints(str(folder / "checkpoints"), CheckpointConfig()).restore(like, step)[0]


def test_lines_stand_at_their_steps_and_only_there(run):
    _, folder = run
    assert [(line["step"], line["split"]) for line in lines(folder)] == [(s, n) for s in (2, 4) for n in LAYERS]
    assert {line["split"] for line in lines(folder, "metrics.jsonl")} == {"train", "validation"}
    shown = {(e.step, v.tag): v.simple_value for e in events(folder) for v in e.summary.value}
    for line in lines(folder):
        for name in set(line) - {"step", "split"}:
            value = shown[line["step"], f"units/{line['split']}/{name}"]
            assert value == pytest.approx(line[name], rel=1e-6)


def test_numbers_are_of_the_parameters_after_the_step_and_of_its_batch(run):
    config, folder = run
    config, graph, state = restored(config, folder, 4)
    batch = next(train_batches(load_corpus(config.data).train, config.data, config.train.seed, 3))
    rows = {k: batch[k][:3, :-1] for k in ("tokens", "segments", "positions")}  # the first three
    wanted = telemetry(nnx.merge(graph, state.params), rows.pop("tokens"), **rows)
    last = [line for line in lines(folder) if line["step"] == 4]
    assert [line["split"] for line in last] == list(wanted) == LAYERS
    for line in last:
        for name, value in wanted[line["split"]].items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_training_is_the_same_to_the_bit_without(run, settings, tmp_path):
    config, folder = run
    train(settings(), str(tmp_path))
    assert not (tmp_path / "telemetry.jsonl").exists()
    one, other = (restored(config, path, 5)[2] for path in (folder, tmp_path))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(a, b)
    with_, without = ([line["loss"] for line in lines(path, "metrics.jsonl")] for path in (folder, tmp_path))
    assert with_ == without


def test_a_restart_repeats_and_loses_nothing(run, settings, tmp_path):
    """Lines beyond the checkpoint are dropped, also where telemetry is off by now."""
    _, folder = run
    train(settings(telemetry_every=2, telemetry_rows=3, steps=3), str(tmp_path))
    with open(tmp_path / "telemetry.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "split": LAYERS[0], "scale": 7.0}) + "\n" + '{"step": 4, "spl')
    train(settings(steps=4), str(tmp_path))
    assert {line["step"] for line in lines(tmp_path)} == {2}
    Checkpoints(str(tmp_path / "checkpoints"), CheckpointConfig()).drop_after(3)
    train(settings(telemetry_every=2, telemetry_rows=3), str(tmp_path))
    assert lines(tmp_path) == lines(folder)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, sequence=2, tensor=2)])
def test_a_mesh_gives_the_numbers_of_its_rows(sizes):
    """Two rows over four devices that split the batch are four: the first of each."""
    base = network_config("aether")
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, batch_size=8),
        train=dataclasses.replace(base.train, telemetry_every=1, telemetry_rows=2),
        mesh=build({"mesh": sizes}).mesh,
    )
    mesh = make_mesh(config.mesh)
    graph, _, like = describe_state(config, mesh)
    _, variables = drawn_state(config)
    params, extras = nnx.split_state(variables, nnx.Param, ...)
    state = jax.device_put(init_state(config, params, extras), parallel.shardings(like, mesh, config.mesh))
    ids = inputs_of(config, rows=8)
    ids = np.concatenate([ids, ids[:, :1]], 1)
    batch = dict(tokens=ids, segments=np.ones_like(ids), positions=np.cumsum(np.ones_like(ids), 1) - 1)
    batch |= dict(mask=np.ones_like(ids[:, 1:]))
    units = Units(config, graph, loss_of(config), like, batch_shapes(config, mesh), mesh)
    got = units.fetched(units(state, parallel.to_global({k: v.astype(np.int32) for k, v in batch.items()}, mesh)))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    wanted = telemetry(nnx.merge(graph, variables), ids[:: 8 // ways, :-1])
    assert list(got) == list(wanted) and len(got) == 4
    for name, numbers in wanted.items():
        assert got[name] == pytest.approx(numbers, rel=1e-4, abs=1e-6), name


PROCESSES = """
    import jax, json, sys
    import numpy as np
    from aether import parallel
    from aether.config import build
    from aether.losses import loss_of
    from aether.testing import tiny_batch, tiny_config
    from aether.train.setup import batch_shapes, describe_state
    from aether.train.units import Units

    config = tiny_config(mesh=dict(fsdp=2), train=dict(telemetry_every=1))
    mesh = parallel.make_mesh(config.mesh)
    graph, make, like = describe_state(config, mesh)
    state = jax.jit(make, out_shardings=parallel.shardings(like, mesh, config.mesh))()
    shapes = batch_shapes(config, mesh)
    units = Units(config, graph, loss_of(config), like, shapes, mesh)
    rows = parallel.local_rows(mesh, config.data.batch_size)
    batch = parallel.to_global({k: v[rows] for k, v in tiny_batch(config).items()}, mesh)
    print(json.dumps(units.fetched(units(state, batch))))
"""


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(run_processes):
    one, *two = (run_processes(PROCESSES, n, 4 // n, timeout=200) for n in (1, 2))
    (wanted,) = (json.loads(text.splitlines()[-1]) for text in one)
    assert len(wanted) == 4 and len(two[0]) == 2
    for text in two[0]:
        got = json.loads(text.splitlines()[-1])
        for name, numbers in wanted.items():
            assert got[name] == pytest.approx(numbers, rel=1e-4, abs=1e-6)
