"""Runs that are one program against the same runs alone."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from aether.errors import InputError
from aether.train.loop import train
from launch.overrides import make_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # tools/ is not installed
CONFIG = str(ROOT / "configs/shakespeare_char.py")
together = importlib.import_module("tools.study_together")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """A small network on a small text, dropout and averages of parameters on."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 17) for i in range(2000)))
    small = ["model.layers=1", "model.width=16", "model.heads=1", "model.dropout=0.1", "train.ema=0.5"]
    data = [f"data.path={text}", "data.context=8", "data.batch_size=8", "train.steps=4", "train.eval_batches=2"]
    return [*small, *data, "train.sample_tokens=0", "train.max_skipped=2", "optim.warmup_steps=1", "train.eval_every=0"]


def test_each_copy_is_the_run_that_it_is_alone(overrides, tmp_path):
    copies = [together.Copy("a", 0.003, 0), together.Copy("b", 0.01, 0), together.Copy("c", 0.01, 5)]
    config = make_config(CONFIG, overrides)
    runs = together.train_together(config, copies)["runs"]
    assert len({run["loss"] for run in runs.values()}) == 3
    own = [*overrides, "optim.learning_rate=0.01", "train.seed=5"]
    train(make_config(CONFIG, own), str(tmp_path / "run"))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["split"] == "validation" and runs["c"]["status"] == "done"
    assert runs["c"]["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert runs["c"]["accuracy"] == pytest.approx(line["accuracy"], rel=1e-6)


def test_a_copy_that_diverges_leaves_the_others_alone(overrides):
    config = make_config(CONFIG, overrides)
    copies = [together.Copy("wild", 1e30, 0), together.Copy("calm", None, 0)]
    made = together.train_together(config, copies)
    assert made["runs"]["wild"]["status"] == "diverged" and made["runs"]["wild"]["loss"] is None
    calm = together.train_together(config, copies[1:])["runs"]["calm"]
    assert made["runs"]["calm"]["loss"] == pytest.approx(calm["loss"], rel=1e-6)


def test_a_start_from_another_run_is_refused(overrides):
    config = make_config(CONFIG, [*overrides, "train.init_from=runs/other"])
    with pytest.raises(InputError, match="train.init_from is 'runs/other'; leave --together out"):
        together.train_together(config, [together.Copy("a", None, 0)])
