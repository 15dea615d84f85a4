"""Scores and samples of a run on disk, through the mains, against the lines of its training."""

import json
import math
import os
import re

import jax
import numpy as np
import pytest

from aether.config import build
from aether.data.corpus import load_validation
from aether.data.loader import evaluation_batches
from aether.errors import InputError
from aether.evaluate import run as module
from aether.evaluate.load import load_run
from aether.evaluate.run import evaluate_run
from aether.testing import tiny_text
from aether.train.loop import train
from launch import cli, evaluate, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on eight devices, checkpoints at 2 and 4, two validation sets: (workdir, its lines)."""
    folder = tmp_path_factory.mktemp("run")
    text = tiny_text(folder, 300)
    (folder / "other.txt").write_text("a line says what comes next if it can.\n" * 20)
    config = build(
        dict(
            model=dict(layers=1, heads=2, width=16, dtype="float32"),
            data=dict(
                path=str(text),
                context=16,
                batch_size=8,
                validation=dict(same=str(text), other=str(folder / "other.txt")),
            ),
            optim=dict(learning_rate=1e-2, warmup_steps=1),
            train=dict(steps=4, eval_every=2, sample_tokens=0, ema=0.5),
            checkpoint=dict(every=2, keep_last=9),
        )
    )
    train(config, str(folder / "run"))
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return folder / "run", {(r["step"], r["split"]): r for r in records}


def call(main, *argv: str) -> int:
    return cli.run(main.main, main.FLAGS, main.__doc__, list(argv))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


def assert_is(found, line):
    assert found["tokens"] == line["tokens"]
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        assert found[name] == pytest.approx(line[name], rel=1e-6), name


@pytest.mark.parametrize(
    ("flags", "step", "name"),
    [((), 4, "same"), (("--step=2",), 2, "same"), (("--data=other",), 4, "other")],
)
def test_evaluate_repeats_the_line_of_the_training(run, capsys, flags, step, name):
    folder, lines = run
    assert call(evaluate, f"--workdir={folder}", *flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["step"], found["average"], found["data"]) == (step, "ema", name)
    assert_is(found, lines[step, name])


def test_any_text_is_scored_whole(run, tmp_path):
    folder, _ = run
    (tmp_path / "new.txt").write_text("if it can, the model reads ß and ⵟ.\n" * 7, encoding="utf-8")
    found = evaluate_run(str(folder), data=str(tmp_path / "new.txt"))
    size = os.path.getsize(tmp_path / "new.txt")
    assert found["tokens"] == size and found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    loaded = load_run(str(folder))
    windows = load_validation(str(tmp_path / "new.txt"), loaded.config.data, loaded.tokenizer)
    assert sum(int(b["mask"].sum()) for b in evaluation_batches(windows, loaded.config.data)) == size


def test_some_batches(run):
    folder, lines = run
    found = evaluate_run(str(folder), batches=2)
    assert found["tokens"] == 2 * 8 * 16 < lines[4, "same"]["tokens"]
    assert found["loss"] != lines[4, "same"]["loss"]
    assert evaluate_run(str(folder), batches=10**6)["loss"] == pytest.approx(lines[4, "same"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--step=3"], ["3", "2, 4"]),
        (["--data=nowhere.txt"], ["nowhere.txt does not exist; set --data to a file, folder or glob"]),
        (["--workdir=nowhere"], ["--workdir", "nowhere"]),
    ],
)
def test_what_is_not_there(run, capsys, flags, words):
    assert call(evaluate, f"--workdir={run[0]}", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err


def test_a_changed_text_is_refused(tmp_path):
    text = tiny_text(tmp_path, 300)
    config = build(
        dict(
            model=dict(layers=1, heads=2, width=16, dtype="float32"),
            data=dict(path=str(text), context=16, batch_size=8, tokenizer="chars"),
            train=dict(steps=1, sample_tokens=0),
        )
    )
    train(config, str(tmp_path / "run"))
    assert evaluate_run(str(tmp_path / "run"))["data"] == "validation"
    with text.open("a") as f:
        f.write("one line more")
    with pytest.raises(InputError, match="data.path have changed since .* --data"):
        evaluate_run(str(tmp_path / "run"))


def test_rows_divide_over_the_devices(run):
    loaded = load_run(str(run[0]))
    ways = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    assert ways == len(jax.devices()) == 8 and [module.rows_of(loaded, n) for n in (1, 8, 9)] == [8, 8, 16]


def sampled(run, capsys, *flags: str) -> str:
    assert call(generate, f"--workdir={run[0]}", "--max_tokens=12", *flags) == 0
    return capsys.readouterr().out


def test_generate_prints_prompt_and_text_alone_and_follows_its_seed(run, capsys):
    one, again = (sampled(run, capsys, "--prompt=the model", "--seed=5") for _ in range(2))
    other = sampled(run, capsys, "--prompt=the model", "--seed=6")
    assert one == again != other
    assert one.startswith("the model") and one.endswith("\n") and len(one) > len("the model\n")


def test_generate_takes_the_likeliest_at_zero_and_several_samples(run, capsys):
    greedy = sampled(run, capsys, "--prompt=the", "--temperature=0")
    assert greedy == sampled(run, capsys, "--prompt=the", "--temperature=0", "--seed=9")
    several = sampled(run, capsys, "--prompt=the", "--num=2", "--top_k=20", "--top_p=0.9")
    texts = re.split(r"--- sample \d of 2 ---\n", several)
    assert len(texts) == 3 and texts[0] == "" and all(t.startswith("the") for t in texts[1:])
    assert np.array_equal(texts[1] == texts[2], False)
