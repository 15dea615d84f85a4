"""The start of a run: what is refused and in which words, what may change, what a new run takes from another."""

import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from aether import parallel
from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig, DataConfig, MeshConfig, build
from aether.data.corpus import load_corpus
from aether.data.prepared import shard_file
from aether.evaluate.load import load_run
from aether.evaluate.run import evaluate_run
from aether.parallel import make_mesh
from aether.testing import tiny_text
from aether.train import setup
from aether.train.loop import train
from aether.workdir import Workdir
from launch import cli
from launch import train as main

CONFIG = """
from aether.config import default_config

def get_config():
    config = default_config()
    config.model.layers, config.model.heads, config.model.width, config.model.vocab = 1, 2, 16, {vocab}
    config.model.dtype = "float32"
    config.data.path, config.data.context, config.data.batch_size = {path!r}, 16, 8
    config.optim.learning_rate, config.optim.warmup_steps = 1e-2, 2
    config.train.steps, config.train.eval_every, config.train.sample_tokens, config.train.ema = 6, 2, 0, 0.6
    config.checkpoint.every, config.checkpoint.keep_last = 2, 100
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        patch.setattr(cli, "prepare_environment", lambda debug: None)
        yield


def write_config(folder: Path, path: Path, vocab: int = 258) -> Path:
    file = folder / "config.py"
    file.write_text(CONFIG.format(path=str(path), vocab=vocab))
    return file


def launch(file: Path, workdir: Path, *words: str) -> int:
    """Run launch.train's main in this process; return its exit code."""
    argv = [f"--config={file}", f"--workdir={workdir}", *(f"--config.{word}" for word in words)]
    return cli.run(main.main, main.FLAGS, main.__doc__, argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that made its six steps: (config file, workdir)."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_config(folder, tiny_text(folder, 600))
    assert launch(file, folder / "run") == 0
    return file, folder / "run"


def begin(config, workdir: Path):
    with ExitStack() as held:
        return setup.start(config, str(workdir), 0.0, held)


def content(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refusal(capsys, code: int = 2) -> str:
    """Return the one line that refuses, after the lines about the start-up; nothing else may stand there."""
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line[0] != " " and not line.startswith("step ")]
    assert out == "" and len(errors) == 1, err  # what is indented are the phases of the start-up
    assert errors[0].startswith("error: ") and errors[0][-1] in ".?"
    assert "Traceback" not in err
    return errors[0]


# --- a run that is going on


def test_a_second_training_is_refused_and_a_look_is_not(finished, capsys):
    file, folder = finished
    with Workdir(str(folder)).alone(print):
        before = content(folder)
        assert launch(file, folder, "train.steps=7", "optim.schedule_steps=6") == 2
        message = refusal(capsys)
        assert message.startswith(f"error: Another process (pid {os.getpid()} on {socket.gethostname()}) trains in ")
        assert content(folder) == before
        assert cli.run(main.main, main.FLAGS, main.__doc__, [f"--workdir={folder}", "--report"]) == 0
        assert "goodput" in capsys.readouterr().out
        assert evaluate_run(str(folder))["step"] == 6


# --- the run that is there already


def test_a_finished_run_says_so_and_changes_nothing(finished, capsys):
    before = content(finished[1])
    assert launch(*finished) == 0
    out, err = capsys.readouterr()
    assert out == "" and "This run is finished: step 6, validation loss " in err
    assert content(finished[1]) == before


@pytest.mark.parametrize(
    ("word", "was", "now"),
    [
        ("model.width=32", "16", "32"),
        ("model.kind=gpt2", "'aether'", "'gpt2'"),
        ("model.dropout=0.5", "0.0", "0.5"),
        ("data.path=elsewhere.txt", "tiny.txt", "elsewhere.txt"),
        ("data.tokenizer=chars", "'bytes'", "'chars'"),
        ("data.batch_size=16", "8", "16"),
        ("data.context=32", "16", "32"),
        ("data.validation.more=x.txt", "{}", "{'more': 'x.txt'}"),
        ("optim.name=muon", "'adamw'", "'muon'"),
        ("optim.learning_rate=0.5", "0.01", "0.5"),
        ("optim.schedule_steps=9", "6", "9"),
        ("train.seed=1", "0", "1"),
        ("train.accumulate=2", "1", "2"),
        ("train.init_from=runs/other", "''", "'runs/other'"),
    ],
)
def test_another_run_is_refused(finished, capsys, word, was, now):
    before = content(finished[1])
    assert launch(*finished, "train.steps=8", word) == 2
    message = refusal(capsys)
    key = word.partition("=")[0].removesuffix(".more")
    assert key in message and was in message and now in message and str(finished[1]) in message, message
    assert content(finished[1]) == before


def test_fewer_steps_than_made_are_refused(finished, capsys):
    before = content(finished[1])
    assert launch(*finished, "train.steps=4") == 2
    message = refusal(capsys)
    assert "has made 6 steps" in message and "train.steps is 4" in message
    assert content(finished[1]) == before


def test_a_changed_text_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    file = write_config(tmp_path, tmp_path / "tiny.txt")
    with tiny_text(tmp_path, 600).open("a") as f:
        f.write("one more line\n")
    record = json.loads((tmp_path / "run/config.json").read_text())
    record["config"]["data"]["path"] = str(tmp_path / "tiny.txt")
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    before = content(tmp_path / "run")
    assert launch(file, tmp_path / "run", "train.steps=8") == 2
    message = refusal(capsys)
    assert "data.path have changed" in message and record["data_fingerprint"][:8] in message
    assert content(tmp_path / "run") == before


def test_a_deep_run_from_before_the_rule_of_depth_keeps_its_rates(tmp_path):
    file = write_config(tmp_path, tiny_text(tmp_path, 600))
    words = ["model.layers=5", "train.eval_every=0"]
    assert launch(file, tmp_path / "run", *words, "train.steps=1") == 0
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["config"]["optim"].pop("base_layers") == 4
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    assert load_run(str(tmp_path / "run")).config.optim.base_layers == 5, "which surgery writes down"
    assert launch(file, tmp_path / "run", *words, "train.steps=2") == 0
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["config"]["optim"]["base_layers"] == 5
    assert "optim.base_layers" not in [change["key"] for change in record["changes"]]


@pytest.mark.parametrize("record", ["[]", "{}", '{"config": {}}'])
def test_a_strange_config_json_is_refused(finished, tmp_path, capsys, record):
    (tmp_path / "config.json").write_text(record)
    assert launch(finished[0], tmp_path) == 2
    assert "config.json is not the record of a run" in refusal(capsys)
    assert (tmp_path / "config.json").read_text() == record


def test_checkpoints_without_a_record_are_refused(finished, tmp_path, capsys):
    shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints")
    before = content(tmp_path)
    assert launch(finished[0], tmp_path) == 2
    assert "has checkpoints but no config.json" in refusal(capsys) and content(tmp_path) == before


def test_what_may_change_is_recorded(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    changes = ["train.steps=8", "train.log_every=2", "train.eval_every=4", "checkpoint.every=1", "data.prefetch=2"]
    assert launch(finished[0], folder, *changes, "mesh.data=1", "model.remat=full") == 0
    assert "going on from step 6 of 8" in capsys.readouterr().err
    record = json.loads((folder / "config.json").read_text())
    made = {c["key"]: (c["from"], c["to"]) for c in record["changes"]}
    assert made == {
        "train.steps": (6, 8),
        "train.log_every": (1, 2),
        "train.eval_every": (2, 4),
        "checkpoint.every": (2, 1),
        "data.prefetch": (4, 2),
        "mesh.data": (-1, 1),
        "model.remat": ("none", "full"),
    }
    assert all(c["time"] for c in record["changes"])
    assert record["config"]["optim"]["schedule_steps"] == 6 and record["config"]["train"]["steps"] == 8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["split"] == "train"] == [1, 2, 3, 4, 5, 6, 8]
    assert lines[-1]["step"] == 8 and {"7", "8"} <= set(os.listdir(folder / "checkpoints"))
    assert launch(finished[0], folder, *changes, "mesh.data=1", "model.remat=full") == 0
    assert json.loads((folder / "config.json").read_text()) == record, "a finished run records nothing"


def test_the_record_of_a_run(finished):
    record = json.loads((finished[1] / "config.json").read_text())
    assert record["config"]["model"]["attention"] == "yat" and record["config"]["optim"]["schedule_steps"] == 6
    assert record["changes"] == [] and record["versions"]["jax"] == jax.__version__
    assert record["git"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["git"])


# --- parameters from another run


def branch(finished, source: str, **overrides):
    """Return the config of a new run that starts from another's parameters, on another text."""
    folder = finished[1].parent
    other = folder / "other.txt"
    other.write_text("so it comes to the next line. " * 40)
    values = json.loads((finished[1] / "config.json").read_text())["config"]
    values["data"]["path"] = str(other)
    values["train"]["init_from"] = source
    for section, change in overrides.items():
        values[section] |= change
    return build(values)


def saved(folder: Path, step: int):
    config = build(json.loads((folder / "config.json").read_text())["config"])
    _, _, like = setup.describe_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return Checkpoints(str(folder / "checkpoints"), CheckpointConfig()).restore(like, step)[0]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(("at", "step"), [("@4", 4), ("", 6)])
def test_init_from_takes_the_parameters_alone(finished, tmp_path, at, step, capsys):
    config = branch(finished, f"{finished[1]}{at}", optim=dict(schedule="wsd", learning_rate=1e-3))
    run = begin(config, tmp_path)
    source = saved(finished[1], step)
    assert same(run.state.params, source.ema) and same(run.state.ema, source.ema)
    assert not same(source.ema, source.params)
    fresh = setup.init_state(run.config, run.state.params)
    assert same(run.state.opt_state, fresh.opt_state) and int(run.state.step) == run.start == 0
    assert f"starting from the parameters of {finished[1]} at step {step}" in capsys.readouterr().err


def test_a_resumed_branch_does_not_start_again(finished, tmp_path, monkeypatch):
    train(branch(finished, str(finished[1]), train=dict(steps=2)), str(tmp_path))
    monkeypatch.setattr(setup, "_first_state", lambda *args: pytest.fail("the parameters were taken again"))
    train(branch(finished, str(finished[1]), train=dict(steps=4)), str(tmp_path))
    assert int(saved(tmp_path, 4).step) == 4


@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        ("@3", {}, ["no checkpoint 3", "2, 4, 6"]),
        ("@x", {}, ["train.init_from", "whole number"]),
        ("/nothing", {}, ["train.init_from", "no run"]),
        ("", dict(model=dict(width=32)), ["16", "32"]),
        ("", dict(data=dict(tokenizer="chars"), model=dict(vocab=0)), ["train.init_from", "bytes", "chars"]),
    ],
)
def test_init_from_what_does_not_fit_is_refused(finished, tmp_path, at, change, words):
    with pytest.raises(setup.InputError) as caught:
        begin(branch(finished, f"{finished[1]}{at}", **change), tmp_path / "run")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()


def test_tokenizers_of_one_name_are_told_apart(finished, tmp_path):
    """Two texts with as many characters, but not the same ones."""
    made = {}
    for name, letters in (("a", "abcdef"), ("b", "ghijkl")):
        (tmp_path / name).write_text(letters * 60)
        data = dict(path=str(tmp_path / name), tokenizer="chars", validation_fraction=0.0)
        made[name] = branch(
            finished, "", data=data, model=dict(vocab=0), train=dict(steps=1), optim=dict(schedule_steps=6)
        )
    train(made["a"], str(tmp_path / "run"))
    values = made["b"].to_json()
    values["train"]["init_from"] = str(tmp_path / "run")
    with pytest.raises(setup.InputError, match="tokenizer chars .7 ids"):
        begin(build(values), tmp_path / "new")


def test_the_source_of_parameters():
    assert setup._source("runs/a@12") == ("runs/a", 12)
    assert setup._source("runs/a") == ("runs/a", None)
    assert setup._source("gs://me@corp/run") == ("gs://me@corp/run", None)
    assert setup._source("gs://me@corp/run@7") == ("gs://me@corp/run", 7)


# --- wrong input


def damaged(folder: Path, text: Path) -> Path:
    """Return a prepared folder with an id beyond the vocabulary in its middle."""
    corpus = load_corpus(DataConfig(path=str(text), context=16))
    copy = folder / "damaged"
    shutil.copytree(corpus.train[0].examples.folder, copy)
    file = shard_file(str(copy), "tokens", 0)
    ids = np.load(file)
    ids[100:200] = 300
    np.save(file, ids)
    return copy


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.stepz=5", ["train.stepz", "train.steps"]),
        ("train.steps=many", ["train.steps", "'many'", "whole number"]),
        ("model.dropout=1.5", ["model.dropout", "1.5", "0.9"]),
        ("data.path=MISSING", ["MISSING"]),
        ("data.path=EMPTY", ["EMPTY"]),
        ("data.path=SHORT", ["SHORT", "data.context=16", "17"]),
        ("data.path=LATIN1 data.tokenizer=chars model.vocab=0", ["LATIN1", "UTF-8"]),
        ("data.path=DAMAGED", ["DAMAGED", "300", "0 to 256"]),
        ("data.tokenizer=words", ["data.tokenizer", "'words'"]),
        ("train.accumulate=3", ["data.batch_size is 8", "train.accumulate 3"]),
        ("model.vocab=100", ["model.vocab is 100", "257"]),
        ("model.width=17", ["model.width is 17", "model.heads 2"]),
        ("mesh.data=2", ["mesh.data=2", "1 devices"]),
        ("optim.lr_scale.nothing=2.0", ["optim.lr_scale", "'nothing'"]),
        ("optim.no_decay=(", ["optim.no_decay", "'('"]),
        ("train.profile_steps=9", ["train.profile_steps", "'9'", "10:20"]),
    ],
)
def test_wrong_input(tmp_path, capsys, word, words):
    text = tiny_text(tmp_path, 200)
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("short")
    (tmp_path / "LATIN1").write_bytes("ein schöner Satz. ".encode("latin-1") * 20)
    if "DAMAGED" in word:
        shutil.move(damaged(tmp_path, text), tmp_path / "DAMAGED")
    file = write_config(tmp_path, text)
    said = [w.replace("data.path=", f"data.path={tmp_path}/") for w in word.split()]
    assert launch(file, tmp_path / "run", *said) == 2
    message = refusal(capsys)
    assert all(w in message for w in words), message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not checkpoints.exists() or not os.listdir(checkpoints)


def test_a_batch_that_the_mesh_does_not_divide(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "make_mesh", make_mesh)  # eight devices
    file = write_config(tmp_path, tiny_text(tmp_path, 200))
    assert launch(file, tmp_path / "run", "data.batch_size=12") == 2
    message = refusal(capsys)
    assert "data.batch_size is 12" in message and "= 8 devices" in message and "multiple of 8" in message
    assert not (tmp_path / "run").exists()


# --- pieces


def test_phases_tell_their_times(capsys):
    phases = setup.Phases(setup.time.perf_counter() - 1.5)
    with phases("data"):
        pass
    assert phases.seconds["imports"] == pytest.approx(1.5, abs=0.2) and phases.seconds["data"] < 0.5
    assert "imports   1.5" in capsys.readouterr().err


def test_shapes_carry_the_shardings_of_their_axes(finished):
    config = build(json.loads((finished[1] / "config.json").read_text())["config"])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, make, like = setup.describe_state(config, mesh)
    table = like.params["embed"]["embedding"].get_value().sharding
    assert table.spec == jax.P("tensor", "fsdp") and table.mesh == mesh
    shapes = jax.eval_shape(make)
    assert [x.shape for x in jax.tree.leaves(like)] == [x.shape for x in jax.tree.leaves(shapes)]
    assert sum(x.sharding.spec == jax.P("tensor", "fsdp") for x in jax.tree.leaves(like)) == 4, (
        "embedding, both moments, average"
    )
