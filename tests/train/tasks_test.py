"""Classifiers and encoders through the trainer.

BatchNorm's statistics are carried, averaged, saved and restored as parameters are.
"""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from aether.config import build
from aether.errors import InputError, StorageError
from aether.evaluate.load import load_run
from aether.evaluate.run import evaluate_run
from aether.testing import tiny_images, tiny_text
from aether.train.loop import train
from launch import cli, generate
from launch.overrides import make_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def config(place, kind="resnet", **sections):
    path = place / "tiny.npz"
    values = dict(
        model=dict(kind=kind, stages="1", width=8, dtype="float32"),
        data=dict(path=str(path if path.exists() else tiny_images(place)), batch_size=16, validation_fraction=0.25),
        image=dict(crop="pad", padding=1, mixup=0.2),
        optim=dict(learning_rate=1e-2, warmup_steps=1, schedule_steps=6),
        train=dict(steps=6, eval_every=6, ema=0.5),
        checkpoint=dict(every=3, keep_last=9),
    )
    return build({name: {**values.get(name, {}), **sections.get(name, {})} for name in {*values, *sections}})


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "tokens_per_second", "data_wait")
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


@pytest.fixture(scope="module")
def runs(place):
    """A run of six steps, and one of three that then went on."""
    c = config(place)
    train(c, str(place / "whole"))
    train(dataclasses.replace(c, train=dataclasses.replace(c.train, steps=3)), str(place / "parts"))
    train(c, str(place / "parts"))
    return place / "whole", place / "parts"


def test_a_continued_run_is_the_run_that_was_left_alone(runs):
    whole, parts = (lines(run) for run in runs)
    assert whole == [line for line in parts if line["split"] == "train" or line["step"] == 6]
    a, b = (load_run(str(run)) for run in runs)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_statistics_are_averaged_with_the_parameters(runs):
    """What is loaded are averages, the running statistics among them: neither their start nor their last value."""
    run = load_run(str(runs[0]))
    found = dict(nnx.to_flat_state(nnx.filter_state(run.params, nnx.BatchStat)))
    assert found and all(np.isfinite(v[...]).all() for v in found.values())
    means = np.concatenate([np.ravel(v[...]) for path, v in found.items() if path[-1] == "mean"])
    assert np.abs(means).max() > 1e-2
    from aether.checkpoint import Checkpoints
    from aether.models import describe_model
    from aether.parallel import placed

    _, params, extras = describe_model(run.config)
    saved = Checkpoints(str(runs[0] / "checkpoints"), run.config.checkpoint)
    likes = (placed(part, run.mesh, run.config.mesh) for part in (params, extras))
    now, _ = saved.restore_model(*likes, averaged=False)
    last = np.concatenate(
        [np.ravel(v[...]) for path, v in nnx.to_flat_state(nnx.filter_state(now, nnx.BatchStat)) if path[-1] == "mean"]
    )
    assert np.abs(last - means).max() > 1e-3


def test_evaluation_repeats_the_line_of_the_training_and_draws(runs):
    line = next(line for line in lines(runs[0]) if line["split"] == "validation")
    found = evaluate_run(str(runs[0]))
    assert found["images"] == line["images"] == 24 and found["step"] == 6
    for name in ("loss", "accuracy", "top5", "calibration_error"):
        assert found[name] == pytest.approx(line[name], rel=1e-5), name
    assert [name.rsplit("/", 3)[1:] for name in found["pictures"]] == [
        ["evaluation", "validation-6", "confusion.png"],
        ["evaluation", "validation-6", "mistakes.png"],
    ]
    assert all(
        (runs[0] / "evaluation/validation-6" / name).stat().st_size > 5000 for name in ("confusion.png", "mistakes.png")
    )


def test_scores_are_printed_where_pictures_cannot_be_left(runs, place, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(runs[1], tmp_path / "run")
    (folder / "evaluation").write_text("a file, where a folder has to be")
    found = evaluate_run(str(folder))
    assert found["images"] == 24 and found["pictures"] == []
    assert "warning: no pictures, name a folder by --pictures: " in capsys.readouterr().err
    monkeypatch.setattr("aether.evaluate.run.summer", lambda *args: pytest.fail("it was scored before"))

    def refuse(dir):
        raise OSError(errno.EROFS, "read-only", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(StorageError, match="asked: read-only file system; make it writable, or choose another folder"):
        evaluate_run(str(folder), pictures=str(tmp_path / "asked"))


def test_other_images_are_scored_by_path_and_must_be_of_these_classes(runs, place, tmp_path):
    assert evaluate_run(str(runs[0]), data=str(place / "tiny.npz"), pictures=str(tmp_path))["images"] == 96
    assert (tmp_path / "confusion.png").exists()
    other = tiny_images(tmp_path, classes=5)
    with pytest.raises(InputError, match="has the class '3', which the training images do not have"):
        evaluate_run(str(runs[0]), data=str(other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aether_resnet", "aether_vit"])
def test_the_family_learns(place, tmp_path, kind):
    model = dict(kind=kind, width=8) | (dict(layers=1, heads=2, patch=2, stages="auto") if kind == "aether_vit" else {})
    c = config(place, model=model, train=dict(steps=40, eval_every=0, ema=0.0, log_every=40), image=dict(mixup=0.0))
    c = dataclasses.replace(c, optim=dataclasses.replace(c.optim, schedule_steps=40, learning_rate=2e-2))
    train(c, str(tmp_path / kind))
    assert lines(tmp_path / kind)[-1]["accuracy"] > 0.9, "chance is a third"


def test_a_run_may_start_from_another_ones_statistics(runs, place, tmp_path):
    c = config(
        place, train=dict(steps=1, eval_every=0, ema=0.0, init_from=str(runs[0])), optim=dict(learning_rate=1e-9)
    )
    train(c, str(tmp_path / "second"))
    first, second = (load_run(str(path)) for path in (runs[0], tmp_path / "second"))
    for (path, x), (_, y) in zip(nnx.to_flat_state(first.params), nnx.to_flat_state(second.params), strict=True):
        if path[-1] in ("mean", "var"):
            moved = np.abs(np.asarray(y[...]) - 0.9 * np.asarray(x[...]))
            assert moved.max() > 0, "one step moves them"
        else:
            np.testing.assert_allclose(x[...], y[...], atol=1e-6)


@pytest.mark.parametrize(
    ("names", "words"),
    [("0123", "3 classes, and this one has 4;"), ("023", "'1' as class 1, and this one has '2' as class 1;")],
)
def test_a_run_of_other_classes_is_no_start(runs, place, tmp_path, rng, names, words):
    """Also where the network has as many logits."""
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(8):
            image = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            image.save(tmp_path / "set" / name / f"{number}.png")
    c = config(place, data=dict(path=str(tmp_path / "set")), train=dict(init_from=str(runs[0])))
    with pytest.raises(InputError, match=f"train.init_from names a run with {words} give images"):
        train(c, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_classifier_writes_no_text(runs, capsys, monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    assert cli.run(generate.main, generate.FLAGS, generate.__doc__, [f"--workdir={runs[0]}"]) == 2
    assert "a run of resnet, which does not write text" in capsys.readouterr().err


def test_a_masked_language_model_learns_and_is_scored_again(tmp_path):
    text = tiny_text(tmp_path, 300)
    c = build(
        dict(
            model=dict(kind="minibert", layers=1, heads=2, width=16, dtype="float32", vocab_multiple=8),
            data=dict(path=str(text), context=16, batch_size=16),
            optim=dict(learning_rate=2e-2, warmup_steps=2),
            train=dict(steps=60, eval_every=0, log_every=60),
        )
    )
    train(c, str(tmp_path / "bert"))
    last = {line["split"]: line for line in lines(tmp_path / "bert")}
    assert last["validation"]["loss"] < 3.5 < np.log(257), "letters are rarer than bytes"
    assert last["validation"]["bits_per_byte"] is None
    found = evaluate_run(str(tmp_path / "bert"))
    assert found["loss"] == pytest.approx(last["validation"]["loss"], rel=1e-5)
    with pytest.raises(InputError, match="--pictures is 'here', but minibert reads text"):
        evaluate_run(str(tmp_path / "bert"), pictures="here")


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(place, tmp_path):
    """Statistics are those of both halves of the batch; every image is scored once, 25 of them in batches of 16."""
    text = f"""
from ml_collections import ConfigDict
from aether.config import default_config

def get_config() -> ConfigDict:
    config = default_config()
    for name, values in {config(place).to_json()!r}.items():
        config[name].update(values)
    config.data.validation = ConfigDict(dict(some={str(tiny_images(tmp_path, count=25))!r}))
    config.checkpoint.every = 0
    return config
"""
    file = tmp_path / "tiny.py"
    file.write_text(text)
    words = [f"--config={file}", f"--workdir={tmp_path / 'two'}"]
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    train(make_config(str(file), []), str(tmp_path / "one"))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [(a["step"], a["split"]) for a in one] == [(b["step"], b["split"]) for b in two]
    assert two[-1]["images"] == 25
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
