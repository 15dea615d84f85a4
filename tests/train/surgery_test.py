"""Runs with more or fewer hidden units: every array of the state follows, the network stays, training goes on."""

import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from aether import parallel
from aether.arrays import named_leaves
from aether.checkpoint import Checkpoints
from aether.config import build, dumps
from aether.data.corpus import open_corpus
from aether.errors import InputError
from aether.evaluate.load import load_run
from aether.parallel import make_mesh
from aether.testing import tiny_run
from aether.train.loop import train
from aether.train.setup import describe_state
from aether.train.surgery import operate
from launch import cli, surgery

STEP = 7


@pytest.fixture(scope="module", autouse=True)
def _few_devices():
    """Two devices, over which hidden units are split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", lambda c, devices=None: make_mesh(c, jax.devices()[:2]))
        patch.setattr("aether.evaluate.load.make_mesh", parallel.make_mesh)
        patch.setattr(cli, "prepare_environment", lambda debug: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return made(kind, edit, **optim) -> a run folder at step 7, all of its arrays drawn; `edit` may change them."""

    def make(kind, edit=lambda leaves: None, **optim):
        folder = tmp_path_factory.mktemp(kind)
        values = tiny_run(kind, folder).to_json()
        values["optim"] |= optim
        values["train"] |= dict(ema=0.9, steps=STEP)
        values["mesh"] |= dict(data=1, tensor=2)
        config = build(values)
        corpus = open_corpus(config)
        config = corpus.resolved(config)
        _, _, like = describe_state(config, parallel.make_mesh(config.mesh))
        rng = np.random.default_rng(0)
        leaves = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named_leaves(like).items()}
        for name, a in leaves.items():
            drawn = rng.normal(size=a.shape) / 3
            leaves[name] = (drawn**2 if "/nu/" in name else drawn).astype(a.dtype) if a.ndim else a + a.dtype.type(STEP)
        for name in [name for name in leaves if name.startswith("ema/")]:
            leaves[name] = leaves[f"params/{name.removeprefix('ema/')}"] * np.float32(1.5)
        edit(leaves)
        state = jax.tree.unflatten(jax.tree.structure(like), leaves.values())
        run = folder / "run"
        run.mkdir()
        record = dict(config=config.to_json(), data_fingerprint=corpus.fingerprint, changes=[], versions={}, git=None)
        (run / "config.json").write_text(dumps(record))
        (run / "left_out.json").write_text(dumps(dict(entries=[[3, 2]], rewinds=1)))
        corpus.save(run)
        checkpoints = Checkpoints(str(run / "checkpoints"), config.checkpoint)
        checkpoints.save(STEP, state, meta={})
        checkpoints.close()
        return run

    return make


def quiet(line):
    pass


def state_in(folder):
    """Return the arrays of a run's state, as its own config describes it."""
    config = build(json.loads((folder / "config.json").read_text())["config"])
    _, _, like = describe_state(config, parallel.make_mesh(config.mesh))
    state, found = Checkpoints(str(folder / "checkpoints"), config.checkpoint).read(like)
    assert found == STEP
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def outputs(folder, average):
    """Return what the network of a run makes of three inputs, in float32 on the run's two devices."""
    run = load_run(str(folder), average=average)
    rng = np.random.default_rng(1)
    images = run.labels is not None
    x = rng.normal(size=(3, 8, 8, 1)).astype(np.float32) if images else rng.integers(0, 12, (3, 9)).astype(np.int32)

    @jax.jit
    def logits(params, x):
        model = nnx.merge(run.graph, params)
        return model(x) if images else model.logits(model(x)[0])

    with jax.set_mesh(run.mesh), jax.default_matmul_precision("highest"):
        return np.asarray(logits(run.params, x))


def units_axis(name):
    for end, axis in (("hidden/kernel", -1), ("hidden/bias", -1), ("mlp/out/kernel", -2), ("0/first/out/kernel", -2)):
        if name.endswith(end):
            return axis
    return None


def test_a_grown_run_computes_the_same_and_trains_on(made, tmp_path):
    run = made("aether", name="muon", momentum=0.9)
    found = operate(str(run), str(tmp_path / "out"), grow=4, log=quiet)
    assert (found["step"], found["hidden"]) == (STEP, [64, 68])
    assert found["changed"] == {f"blocks.{k}.mlp.hidden": [64, 65, 66, 67] for k in (0, 1)}
    before, after = state_in(run), state_in(tmp_path / "out")
    moved = 0
    for name, a in before.items():
        b, axis = after[name], units_axis(name)
        if axis is None:
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        old, new = np.split(b, [64], axis)
        np.testing.assert_array_equal(old, a, err_msg=name)
        assert new.shape[axis] == 4
        silent = name.startswith("opt_state/") or name.endswith("out/kernel")
        assert silent == (not new.any()), name
        moved += name.startswith("opt_state/")
    assert moved == 5, "Muon's momentum of the outputs' kernel, Adam's two moments of prototypes and biases"
    for average in ("none", "ema"):
        a, b = outputs(run, average), outputs(tmp_path / "out", average)
        assert np.abs(a - b).max() <= 1e-6 * np.abs(a).max()

    record = json.loads((tmp_path / "out/config.json").read_text())
    assert [(c["key"], c["from"], c["to"]) for c in record["changes"]] == [("model.hidden", 64, 68)]
    assert json.loads((tmp_path / "out/left_out.json").read_text())["entries"] == [[3, 2]]
    values = build(record["config"]).to_json()
    values["model"]["hidden"] = 0  # what a config that leaves it open says
    values["train"] |= dict(steps=STEP + 2, eval_every=2)
    train(build(values), str(tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["split"] == "train"] == [STEP + 1, STEP + 2]
    trained = load_run(str(tmp_path / "out"), average="none")
    readout = np.asarray(trained.params["blocks"]["mlp"]["out"]["kernel"][...])
    assert trained.step == STEP + 2 and readout.shape == (2, 68, 16) and (readout[:, 64:] != 0).all()


def test_a_grown_resnet_computes_the_same(made, tmp_path):
    run = made("aether_resnet")
    found = operate(str(run), str(tmp_path / "out"), grow=2, log=quiet)
    assert found["hidden"] == [8, 10] and found["changed"]["stages.1.0.hidden"] == [16, 17, 18, 19]
    for average in ("none", "ema"):
        a, b = outputs(run, average), outputs(tmp_path / "out", average)
        assert np.abs(a - b).max() <= 1e-6 * np.abs(a).max()


def twins(leaves):
    """Make units 5 and 40 of block 0 the same, 6 and 41 of its parameters only, and two pairs of block 1."""
    for part, block, kept, gone in (
        *((part, *pair) for part in ("params", "ema") for pair in ((0, 5, 40), (0, 50, 51), (1, 0, 1), (1, 0, 2))),
        ("params", 0, 6, 41),
    ):
        for role in ("kernel", "bias"):
            a = leaves[f"{part}/blocks/mlp/hidden/{role}"]
            a[block, ..., gone] = a[block, ..., kept]


def test_equal_units_of_a_run_are_merged(made, tmp_path):
    run = made("aether", twins)
    found = operate(str(run), str(tmp_path / "out"), merge=0.0, log=quiet)
    assert found["hidden"] == [64, 62]
    assert found["changed"] == {"blocks.0.mlp.hidden": [(5, 40), (50, 51)], "blocks.1.mlp.hidden": [(0, 1), (0, 2)]}
    before, after = state_in(run), state_in(tmp_path / "out")
    for name, a in before.items():
        assert after[name].shape == tuple(62 if n == 64 and units_axis(name) else n for n in a.shape), name
    mu, nu = (next(n for n in before if n.endswith(f"{m}/blocks/mlp/hidden/kernel")) for m in ("mu", "nu"))
    np.testing.assert_allclose(after[mu][1, :, 0], before[mu][1, :, :3].sum(-1), rtol=1e-5)
    np.testing.assert_allclose(after[nu][1, :, 0], np.sqrt(before[nu][1, :, :3]).sum(-1) ** 2, rtol=1e-5)
    for average in ("none", "ema"):
        a, b = outputs(run, average), outputs(tmp_path / "out", average)
        assert np.abs(a - b).max() <= 1e-6 * np.abs(a).max()


def test_the_command(made, tmp_path, capsys):
    run, folder = made("aether", twins), str(tmp_path / "new")

    def call(*argv):
        code = cli.run(surgery.main, surgery.FLAGS, surgery.__doc__, [f"--workdir={run}", f"--out={folder}", *argv])
        return code, capsys.readouterr()

    capsys.readouterr()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    both = ("--remove=blocks.0.mlp.hidden=3,17", "--remove=blocks.1.mlp.hidden=0,63")
    for argv, said in (
        ((), "give one of them"),
        (("--grow=2", "--merge=0"), "give one of them"),
        (("--grow=3",), "mesh.tensor=2 does not divide"),
        (both[:1], "Of blocks.1.mlp.hidden 0 units are to go and of blocks.0.mlp.hidden 2"),
        (("--remove=blocks.0.mlp.hidden=3,64", both[1]), "There is no unit 64 in blocks.0.mlp.hidden"),
        (("--remove=blocks.0.mlp.hidden:3",), "write a layer and its units"),
        ((both[0], both[0]), "names a layer twice"),
        (("--grow=2", "--step=5"), "no checkpoint 5"),
        (("--grow=2", f"--out={tmp_path}/full"), "--out is"),
    ):
        code, printed = call(*argv)
        error = printed.err.strip()
        assert code == 2 and said in error and error.count("\n") == 0, error
        assert sorted(os.listdir(tmp_path)) == ["full"], "nothing is left half-written"
    code, printed = call(*both)
    assert code == 0 and json.loads(printed.out)["hidden"] == [64, 62]
    kernel = state_in(run)["params/blocks/mlp/hidden/kernel"]
    rest = [np.delete(kernel[k], units, -1) for k, units in enumerate([[3, 17], [0, 63]])]
    np.testing.assert_array_equal(state_in(tmp_path / "new")["params/blocks/mlp/hidden/kernel"], rest)


def test_what_has_no_equal_or_no_units_is_said(made, tmp_path):
    with pytest.raises(InputError, match="0 in blocks.0.mlp.hidden, 0 in blocks.1.mlp.hidden; all blocks lose as many"):
        operate(str(made("aether")), str(tmp_path / "out"), merge=1e-6, log=quiet)
    with pytest.raises(InputError, match="model.kind=gpt2 and model.mlp=gelu has no hidden ⵟ units"):
        operate(str(made("gpt2")), str(tmp_path / "out"), grow=2, log=quiet)
    assert not os.listdir(tmp_path)
