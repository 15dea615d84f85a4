"""The way back: a run made of an export scores the same, and trains on."""

import functools
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from aether.config import build
from aether.errors import InputError
from aether.evaluate.load import load_run
from aether.evaluate.run import evaluate_run
from aether.evaluate.tasks.run import evaluate_tasks
from aether.export.load import load_export
from aether.export.run import export_run
from aether.testing import tiny_text
from aether.train.loop import train
from launch import cli, load


def quiet(line):
    pass


@pytest.fixture(scope="module")
def export(trained, tmp_path_factory):
    """Return export(kind) -> the folder of a run's export to npz."""

    @functools.cache
    def made(kind):
        out = tmp_path_factory.mktemp("exports") / kind
        export_run(str(trained(kind)), "npz", str(out), log=quiet)
        return out

    return made


@pytest.mark.parametrize("kind", ["aether", pytest.param("aether_resnet", marks=pytest.mark.slow)])
def test_a_run_comes_back(kind, trained, export, tmp_path):
    again = tmp_path / "again"
    assert load_export(str(export(kind)), str(again), log=quiet) == 30
    was, now = load_run(str(trained(kind))), load_run(str(again))
    assert now.step == 30 and now.config == was.config
    jax.tree.map(np.testing.assert_array_equal, was.params, now.params)
    assert evaluate_run(str(trained(kind)))["loss"] == evaluate_run(str(again))["loss"]
    record = json.loads((again / "config.json").read_text())
    config = build(record["config"] | {"train": record["config"]["train"] | {"steps": 34, "eval_every": 2}})
    train(config, str(again))
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["split"] == "train"] == [31, 32, 33, 34]
    assert load_run(str(again)).step == 34


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_this_machine(export, tmp_path):
    folder = shutil.copytree(export("aether"), tmp_path / "export")
    content = json.loads((folder / "config.json").read_text())
    content["aether"]["config"]["mesh"]["fsdp"] = 3
    (folder / "config.json").write_text(json.dumps(content))
    assert load_export(str(folder), str(tmp_path / "again"), log=quiet) == 30


def test_an_exported_import_is_the_same_export(export, tmp_path):
    first = export("aether")
    load_export(str(first), str(tmp_path / "again"), log=quiet)
    export_run(str(tmp_path / "again"), "npz", str(tmp_path / "second"), log=quiet)
    with np.load(first / "parameters.npz") as a, np.load(tmp_path / "second/parameters.npz") as b:
        assert sorted(a.files) == sorted(b.files)
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_wrong_input_is_one_sentence(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    folder = export("aether")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    config = json.loads((folder / "config.json").read_text())
    newer, odd, cut = (shutil.copytree(folder, tmp_path / name) for name in ("newer", "odd", "cut"))
    (newer / "config.json").write_text(json.dumps(config | {"network": config["network"] | {"format": 99}}))
    config["aether"]["config"]["model"]["width"] = 32
    (odd / "config.json").write_text(json.dumps(config))
    (cut / "parameters.npz").write_bytes((cut / "parameters.npz").read_bytes()[:1000])
    before = sorted(os.listdir(tmp_path))
    capsys.readouterr()
    for source, workdir, said in (
        (folder, "full", "not empty; give a new folder"),
        (folder, "s3://bucket/run", "give a new local folder"),
        (tmp_path / "nowhere", "new", "is no export of Aether's: it has no config.json"),
        (newer, "new", "of format 99"),
        (odd, "new", "and this network as"),
        (cut, "new", "is damaged"),
    ):
        where = workdir if "://" in workdir else tmp_path / workdir
        assert cli.run(load.main, load.FLAGS, load.__doc__, [f"--export={source}", f"--workdir={where}"]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and error.count("\n") == 0, error
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), [("gpt2", "gpt2"), ("aether", "torch"), ("aether_vit", "hf")])
def test_other_targets_are_read_back(kind, target, trained, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")
    export_run(str(trained(kind)), target, str(tmp_path / "out"), log=quiet)
    load_export(str(tmp_path / "out"), str(tmp_path / "again"), log=quiet)
    jax.tree.map(
        np.testing.assert_array_equal, load_run(str(trained(kind))).params, load_run(str(tmp_path / "again")).params
    )


def test_any_gpt2_of_transformers(tmp_path):
    """Random weights, saved by transformers, evaluated here: the same perplexity by strides."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[hf]'")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="give its --tokenizer"):
        load_export(str(tmp_path / "gpt2"), str(tmp_path / "run"), log=quiet)
    load_export(str(tmp_path / "gpt2"), str(tmp_path / "run"), tokenizer="bytes", log=quiet)
    text = tiny_text(tmp_path, 100)
    found = evaluate_tasks(str(tmp_path / "run"), [f"sliding:{text}"], stride=12)["tasks"]["sliding-tiny"]
    assert found["perplexity"] == pytest.approx(strided(model, text.read_bytes(), 32, 12), rel=1e-4)


def strided(model, text, context, stride):
    """The perplexity of Hugging Face's guide: windows of the context, every `stride` tokens, the new ones scored."""
    import torch

    ids = torch.tensor([list(text)])
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=targets).loss
        scored = int((targets != -100).sum()) - 1
        total, count, before = total + float(loss) * scored, count + scored, end
        if end == ids.shape[1]:
            break
    return math.exp(total / count)
