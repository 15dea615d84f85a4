"""Loading runs: which parameters, where they lie, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from aether.checkpoint import Checkpoints
from aether.config import MeshConfig
from aether.data.tokenizers import chars_tokenizer, save_tokenizer
from aether.errors import InputError
from aether.evaluate.load import load_run
from aether.parallel import make_mesh, shardings
from aether.testing import tiny_config, tiny_model
from aether.train.step import init_state
from aether.workdir import Workdir

TOKENIZER = chars_tokenizer("abcdefgh\n ")


def write_run(path, *steps, mesh=None, **overrides):
    """Write what a run leaves behind, with parameters that tell step and average apart; return config and state."""
    config = tiny_config(**overrides)
    if mesh:
        config = dataclasses.replace(config, mesh=mesh)
    workdir = Workdir(str(path))
    workdir.write_json("config.json", {"config": config.to_json(), "changes": []})
    save_tokenizer(TOKENIZER, str(path / "tokenizer"))
    params = nnx.state(tiny_model(config))
    state = init_state(config, params)
    if mesh:
        state = jax.device_put(state, shardings(state, make_mesh(mesh)))
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint)
    for step in steps:
        state.params = shifted(state.params, step)
        checkpoints.save(step, state, meta={})
    checkpoints.close()
    return config, state


def shifted(params, by):
    return jax.tree.map(lambda p: p + by, params)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_run(path, 2, 5)
    return path


def test_the_last_step_and_the_run_s_own_config_and_tokenizer(folder):
    run = load_run(str(folder))
    assert (run.step, run.config, run.workdir) == (5, tiny_config(), str(folder))
    assert run.tokenizer.hash == TOKENIZER.hash
    expected = shifted(shifted(nnx.state(tiny_model(run.config)), 2), 5)
    assert same(run.params, expected)
    tokens = np.zeros((1, 4), np.int32)
    model, mine = nnx.merge(run.graph, run.params), tiny_model(run.config)
    nnx.update(mine, expected)
    np.testing.assert_array_equal(model(tokens)[0], mine(tokens)[0])


def test_a_step_by_number(folder):
    early, late = load_run(str(folder), 2), load_run(str(folder), 5)
    assert (early.step, late.step) == (2, 5) and not same(early.params, late.params)


def test_averaged_parameters_where_there_are_some(tmp_path):
    _, state = write_run(tmp_path, 3, train=dict(ema=0.9))
    run = load_run(str(tmp_path))
    assert same(run.params, state.ema) and not same(run.params, state.params)


def test_a_sharded_run_on_its_mesh_and_on_others(tmp_path):
    _, state = write_run(tmp_path, 1, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    for mesh in (None, make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(fsdp=2))):
        run = load_run(str(tmp_path), mesh=mesh)
        assert same(run.params, state.params)
        kernel = run.params["embed"]["embedding"][...]
        assert kernel.sharding.mesh == run.mesh and len(kernel.sharding.device_set) == (run.mesh.size)
        ways = run.mesh.shape["fsdp"] * run.mesh.shape["tensor"]
        assert kernel.addressable_shards[0].data.size == kernel.size // ways
    assert run.mesh.shape == {"data": 4, "fsdp": 2, "tensor": 1}


def test_a_run_from_another_number_of_devices_is_spread_over_those_here(tmp_path):
    write_run(tmp_path, 1)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["mesh"] = dict(data=3, fsdp=1, tensor=1)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert load_run(str(tmp_path)).mesh.shape == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("missing", ["all", "config.json", "checkpoints", "step", "tokenizer"])
def test_what_is_missing_is_named(folder, tmp_path, missing):
    path, step = tmp_path / "run", None
    if missing != "all":
        shutil.copytree(folder, path)
    if missing == "config.json":
        (path / missing).unlink()
    elif missing in ("checkpoints", "tokenizer"):
        shutil.rmtree(path / missing)
    elif missing == "step":
        step = 77
    says = {
        "all": "there is no run .it has no config.json",
        "config.json": "there is no run .it has no config.json",
        "checkpoints": "has no checkpoint yet",
        "step": "no checkpoint 77 in .*; it has 2, 5",
        "tokenizer": "tokenizer.json",
    }
    with pytest.raises(InputError, match=says[missing]) as caught:
        load_run(str(path), step)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.exists() == (missing != "all")


def test_a_config_of_another_version_is_refused(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "run")
    record = json.loads((path / "config.json").read_text())
    record["config"]["model"]["novelty"] = 1
    (path / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"config.json is not the record.*model.novelty"):
        load_run(str(path))


def test_loading_changes_nothing(folder):
    def files():
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    before = files()
    load_run(str(folder), 2)
    assert files() == before


def test_nothing_is_initialised(folder, monkeypatch):
    traced = []
    normal = jax.random.normal

    def noted(key, *args, **kwargs):
        traced.append(isinstance(key, jax.core.Tracer))
        return normal(key, *args, **kwargs)

    monkeypatch.setattr(jax.random, "normal", noted)
    load_run(str(folder))
    assert traced and all(traced)
