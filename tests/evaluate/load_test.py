"""Loading runs: which parameters, where they lie, and what is refused."""

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
from aether.evaluate.load import _mean, load_run
from aether.models import make_model
from aether.parallel import make_mesh, shardings
from aether.testing import tiny_config
from aether.workdir import Workdir

TOKENIZER = chars_tokenizer("abcdefgh\n ")


def write_run(path, *steps, spread=False, **overrides):
    """Write what a run leaves behind, parameters drawn from the step; return config, last ones and average."""
    config = tiny_config(**overrides)
    workdir = Workdir(str(path))
    workdir.write_json("config.json", {"config": config.to_json(), "changes": []})
    save_tokenizer(TOKENIZER, str(path / "tokenizer"))
    mesh = make_mesh(config.mesh) if spread else None
    params, ema = None, parameters(config, 1000, mesh)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint)
    for step in steps:
        params = parameters(config, step, mesh)
        checkpoints.save(step, {"params": params, "ema": ema if config.train.ema else None, "step": step}, meta={})
    checkpoints.close()
    return config, params, ema


def graph_and_shapes(config):
    return nnx.split(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))


def parameters(config, seed, mesh=None):
    """Make parameters of the right shapes without compiling anything."""
    rng = np.random.default_rng(seed)
    shapes = graph_and_shapes(config)[1]
    values = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), shapes)
    return jax.device_put(values, shardings(shapes, mesh) if mesh else jax.devices()[0])


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
    assert same(run.params, parameters(run.config, 5))
    assert run.graph == graph_and_shapes(run.config)[0]
    nnx.merge(run.graph, run.params)


def test_a_step_by_number(folder):
    run = load_run(str(folder), 2)
    assert run.step == 2 and same(run.params, parameters(run.config, 2))


def test_averaged_parameters_where_there_are_some(tmp_path):
    _, params, ema = write_run(tmp_path, 3, train=dict(ema=0.9))
    run = load_run(str(tmp_path))
    assert same(run.params, ema) and not same(run.params, params)


def test_which_average_is_the_person_s_choice(tmp_path):
    _, params, ema = write_run(tmp_path, 3, train=dict(ema=0.9))
    for average, expected, name in (("none", params, "none"), ("ema", ema, "ema"), ("auto", ema, "ema")):
        run = load_run(str(tmp_path), average=average)
        assert same(run.params, expected) and run.average == name


@pytest.mark.parametrize(("step", "steps"), [(None, (4, 5, 9)), (5, (2, 4, 5)), (8, (2, 4, 5))])
def test_the_mean_of_the_last_checkpoints(tmp_path, monkeypatch, step, steps):
    config, _, _ = write_run(tmp_path, 2, 4, 5, 9, spread=True, mesh=dict(data=2, fsdp=4), checkpoint=dict(keep_last=9))
    read = []
    restore = Checkpoints.restore_model

    def noted(self, params, extras, step, **rest):
        read.append((step, sum(not x.is_deleted() for x in jax.live_arrays() if x.shape == largest)))
        return restore(self, params, extras, step, **rest)

    largest = max((x.shape for x in jax.tree.leaves(graph_and_shapes(config)[1])), key=np.prod)
    before = sum(x.shape == largest for x in jax.live_arrays())
    monkeypatch.setattr(Checkpoints, "restore_model", noted)
    run = load_run(str(tmp_path), step, average="last:3")
    assert (run.step, run.average) == (steps[-1], "last:3")
    # The mean alone is in memory as the next one is read.
    per_model = sum(x.shape == largest for x in jax.tree.leaves(run.params))
    assert [(s, n - before) for s, n in read] == list(zip(steps, (0, per_model, per_model), strict=True))
    parts = [jax.tree.leaves(parameters(config, s)) for s in steps]
    for leaf, *values in zip(jax.tree.leaves(run.params), *parts, strict=True):
        np.testing.assert_allclose(leaf, np.mean(np.float64(values), 0), atol=1e-6)
        assert leaf.sharding.mesh == run.mesh


def test_the_mean_of_what_a_forward_pass_changes_too(tmp_path):
    """BatchNorm's statistics are averaged; a counter is the last one's."""
    means = [dict(mean=np.float32([1, 2]), count=np.int32(3)), dict(mean=np.float32([5, 4]), count=np.int32(8))]
    checkpoints = Checkpoints(str(tmp_path), tiny_config().checkpoint)
    weights = [{"w": nnx.Param(np.float32([k, 2 * k]))} for k in (1, 4)]
    for step, (w, extra) in enumerate(zip(weights, means, strict=True), 1):
        extras = nnx.State({k: nnx.BatchStat(v) for k, v in extra.items()})
        checkpoints.save(step, {"params": nnx.State(w), "extras": extras}, meta={})
    checkpoints.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (nnx.State(weights[0]), extras))
    mean = _mean(checkpoints, *like, [1, 2])
    checkpoints.close()
    assert {k: v[...].tolist() for k, v in mean.items()} == dict(w=[2.5, 5.0], mean=[3.0, 3.0], count=8)


@pytest.mark.parametrize(
    ("average", "step", "says"),
    [
        ("ema", None, "--average is ema, but the run in .* keeps no moving average .train.ema=0.; take none or last:K"),
        ("last:3", None, r"3 checkpoints are wanted, and .* has 2 \(2, 5\); ask for fewer"),
        ("last:2", 4, r"2 checkpoints are wanted up to step 4, and .* has 1 \(2\)"),
        ("last:1", 1, "1 checkpoint is wanted up to step 1, and .* has none"),
        *(
            (word, None, f"--average is '{word}'; it takes auto, none, ema, or last:K")
            for word in ("mean", "last", "last:0", "last:x", "last:-1", "")
        ),
    ],
)
def test_averages_that_are_not_there(folder, average, step, says):
    with pytest.raises(InputError, match=says) as caught:
        load_run(str(folder), step, average=average)
    assert "\n" not in str(caught.value)


def test_a_sharded_run_on_its_mesh_and_on_others(tmp_path):
    _, params, _ = write_run(tmp_path, 1, spread=True, mesh=dict(data=1, fsdp=4, tensor=2))
    for mesh in (None, make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(fsdp=2))):
        run = load_run(str(tmp_path), mesh=mesh)
        assert same(run.params, params)
        kernel = run.params["embed"]["embedding"][...]
        assert kernel.sharding.mesh == run.mesh and len(kernel.sharding.device_set) == run.mesh.size
        ways = run.mesh.shape["fsdp"] * run.mesh.shape["tensor"]
        assert kernel.addressable_shards[0].data.size == kernel.size // ways
    assert run.mesh.shape == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}


def test_a_run_from_another_number_of_devices_is_spread_over_those_here(tmp_path):
    write_run(tmp_path, 1, mesh=dict(data=3))
    assert load_run(str(tmp_path)).mesh.shape == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}


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
