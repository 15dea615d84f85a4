"""Exports of trained runs from the command line: what the folder holds, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aether.config import MeshConfig
from aether.evaluate.load import load_run
from aether.export import child, linen, run, targets
from aether.export.bundle import parameters_of
from aether.export.run import export_run
from aether.parallel import make_mesh
from aether.storage import DamagedError
from launch import cli, export


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


def call(*argv):
    return cli.run(export.main, export.FLAGS, export.__doc__, list(argv))


@pytest.mark.parametrize("kind", ["aether", "aether_resnet"])
def test_a_trained_run(kind, trained, tmp_path, capsys):
    workdir, out = trained(kind), tmp_path / "deep/export"
    assert call(f"--workdir={workdir}", "--to=npz", f"--out={out}", "--license=apache-2.0") == 0
    parity = json.loads((out / "parity.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == parity
    assert parity["verified"] and parity["inputs"] == 64 and 0 < parity["max_logit_difference"] < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["aether"]["step"] == 30 and config["aether"]["results"]["validation"]["loss"] < 2.5
    with np.load(out / "parameters.npz") as file:
        assert config["aether"]["parameters"] == sum(file[name].size for name in file.files)
    card = (out / "README.md").read_text()
    loss = config["aether"]["results"]["validation"]["loss"]
    assert 'license: "apache-2.0"' in card and f"| validation | loss | {loss:.4g} |" in card and "UNVER" not in card
    assert sorted(os.listdir(tmp_path / "deep")) == ["export"]  # nothing is left beside it


@pytest.fixture
def between(monkeypatch):
    """Return between(f), which has f(folder) called when the export is written and before it is run."""

    def spoil(f):
        whole = run.child

        def spoiling(part, to, target, made, *rest):
            if part == "replay":
                f(made)
            whole(part, to, target, made, *rest)

        monkeypatch.setattr(run, "child", spoiling)

    return spoil


def test_an_export_that_differs_is_marked(trained, tmp_path, between, capsys):
    def scale_the_head(folder):
        with np.load(folder / "parameters.npz") as file:
            arrays = dict(file)
        np.savez(folder / "parameters.npz", **arrays | {"head.kernel": arrays["head.kernel"] * np.float32(1.01)})

    between(scale_the_head)
    out = tmp_path / "wrong"
    assert call(f"--workdir={trained('aether')}", "--to=npz", f"--out={out}") == 3
    said = capsys.readouterr().err
    assert "logits differ by up to" in said and "UNVERIFIED" in said
    assert "logits differ" in (out / "UNVERIFIED").read_text()
    assert not json.loads((out / "parity.json").read_text())["verified"]
    assert "**UNVERIFIED" in (out / "README.md").read_text()


def test_an_export_that_does_not_run_leaves_nothing(trained, tmp_path, between, capsys):
    between(lambda folder: (folder / "parameters.npz").unlink())
    assert call(f"--workdir={trained('aether')}", "--to=npz", f"--out={tmp_path / 'broken'}") == 3
    said = capsys.readouterr().err
    assert "does not run: FileNotFoundError" in said and not os.listdir(tmp_path)


def test_how_a_child_ended_is_told(tmp_path):
    """A child that is killed says nothing, and JAX adds lines to what is raised under jit."""
    for code, said in (
        (-9, "was killed (SIGKILL), perhaps since memory ran out"),
        (1, "does not run: it said nothing"),
    ):
        error = run._told("npz", tmp_path, code, "")
        assert said in str(error) and error.exit_code == 3
    (tmp_path / "error.json").write_text(json.dumps(child.told(DamagedError("step 5 is damaged"))))
    error = run._told("npz", tmp_path, 1, "For simplicity, JAX has removed its internal frames")
    assert (str(error), error.exit_code) == ("step 5 is damaged", 74)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_an_interrupted_export(how, trained, tmp_path):
    heed = (
        "import os, signal, sys; signal.signal(signal.SIGINT, lambda *_: None); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", heed, sys.executable, "-m", "launch.export", "--to=npz"]  # not all shells leave it
    command += [f"--workdir={trained('aether')}", f"--out={tmp_path / 'deep/out'}"]
    whole = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    of_parent = Path(f"/proc/{whole.pid}/task/{whole.pid}/children")
    until(lambda: whole.poll() is None and of_parent.read_text().split())
    (part,) = of_parent.read_text().split()
    until(lambda: "aether.export.child" in Path(f"/proc/{part}/cmdline").read_text())
    os.kill(whole.pid, how) if how == signal.SIGKILL else os.killpg(whole.pid, how)
    said = whole.communicate(timeout=60)[1]
    until(lambda: not Path(f"/proc/{part}").exists())
    if how == signal.SIGINT:
        assert whole.returncode == 1 and "interrupted" in said and not os.listdir(tmp_path)


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_most_targets_need_no_jax():
    """What only runs an export must not hold JAX's memory beside that of the framework."""
    names = [name for name in targets.NAMES if name not in ("nmn", "stablehlo")]
    code = f"import sys; from aether.export import child, run, targets; [targets.find(name) for name in {names}]; "
    said = subprocess.run([sys.executable, "-c", code + "print('jax' in sys.modules)"], capture_output=True, text=True)
    assert said.stdout.strip() == "False", said.stderr


def test_wrong_input_is_one_sentence(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    workdir, out = f"--workdir={trained('aether')}", f"--out={tmp_path / 'new'}"
    monkeypatch.setattr(linen, "TARGET", dataclasses.replace(linen.TARGET, packages=("nowhere_at_all",), extra="some"))
    for argv, said in (
        ([workdir, "--to=caffe", out], "--to is 'caffe'; it takes one of hf, torch"),
        ([workdir, "--to=linen", out], 'needs nowhere_at_all: pip install -e ".[some]"'),
        ([workdir, "--to=npz", f"--out={tmp_path / 'full'}"], "not empty"),
        ([workdir, "--to=npz", out, "--step=7"], "There is no checkpoint 7"),
        ([workdir, "--to=npz", out, "--data=nowhere.txt"], "nowhere.txt"),
        ([f"--workdir={tmp_path / 'none'}", "--to=npz", out], "no config.json"),
        ([workdir, "--to=npz"], "--out"),
    ):
        assert call(*argv) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and error.count("\n") == 0, error
    assert sorted(os.listdir(tmp_path)) == ["full"] and os.listdir(tmp_path / "full") == ["file"]


def test_sharded_parameters_stay_where_they_are(trained):
    """With parameters over fsdp and tensor the arrays are the same, and none is gathered on a device."""
    whole = load_run(str(trained("aether")))
    sharded = load_run(str(trained("aether")), mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    spread = [v for v in jax.tree.leaves(sharded.params) if not v.sharding.is_fully_replicated]
    assert len(spread) >= 5
    with jax.transfer_guard_device_to_device("disallow"):
        found = parameters_of(sharded.config, sharded.params)
    for name, value in parameters_of(whole.config, whole.params).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minibert", pytest.param("aether_vit", marks=pytest.mark.slow)])
def test_rounded_parameters_of_a_run_from_elsewhere(kind, trained, tmp_path):
    """It was killed as it wrote a line, and its attention had a kernel that this machine has not."""
    workdir = shutil.copytree(trained(kind), tmp_path / "run")
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["model"]["attention_impl"] = "flash"
    (workdir / "config.json").write_text(json.dumps(record))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "spl')
    parity = export_run(str(workdir), "npz", str(tmp_path / "out"), dtype="bfloat16", log=lambda line: None)
    assert parity.holds
    with np.load(tmp_path / "out/parameters.npz") as file:
        assert {file[name].dtype for name in file.files} == {np.dtype(np.uint16)}
