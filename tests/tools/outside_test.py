"""The study of what is outside, on tiny runs: what a record holds, other data, and the tables."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from aether.data.corpus import open_corpus
from aether.errors import InputError
from aether.evaluate.inputs import foreign
from aether.evaluate.load import Run
from aether.parallel import make_mesh
from aether.testing import drawn_state, tiny_run
from launch import cli
from tools import outside


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return paths: runs of three kinds, as if they lay on a disk, and other data."""
    made = {}
    for kind in ("aether_resnet", "resnet", "aether"):
        config = tiny_run(kind, tmp_path_factory.mktemp(kind))
        corpus = open_corpus(config)
        config = corpus.resolved(config)
        parts = *drawn_state(config), corpus.tokenizer, corpus.labels, make_mesh(config.mesh, jax.devices()[:1])
        made[kind] = Run(kind, 30, config, *parts), corpus
    folder = tmp_path_factory.mktemp("others")
    rng = np.random.default_rng(1)
    np.savez(folder / "noise.npz", images=rng.integers(0, 256, (40, 12, 12, 1), np.uint8), labels=np.arange(40) % 7)
    (folder / "other.txt").write_text("say line and reads a model if can it " * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aether.evaluate.load.load_run", lambda path: made[path][0])
        patch.setattr("aether.evaluate.run.own_corpus", lambda run: made[run.workdir][1])
        patch.setattr(cli, "prepare_environment", lambda debug: None)
        yield dict(
            text_run=made["aether"][0],
            image_run=made["resnet"][0],
            noise=str(folder / "noise.npz"),
            text=str(folder / "other.txt"),
        )


def call(*argv):
    return cli.run(outside.main, outside.define(), outside.__doc__, list(argv))


def test_images_of_two_kinds_of_runs(runs, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    argv = ["--runs=aether_resnet", "--baselines=resnet", f"--out={out}", "--usual=100"]
    assert call(*argv, f"--outside=others:{runs['noise']}", "--rows=50") == 0
    ours, theirs = map(json.loads, out.read_text().splitlines())
    assert (ours["kind"], ours["group"], ours["best"]) == ("aether_resnet", "runs", "profile")
    assert (theirs["kind"], theirs["group"], theirs["best"]) == ("resnet", "baselines", "stream")
    for record in (ours, theirs):
        sizes = record["inputs"]
        assert sizes["inside"] == sizes["inverted"] == 50 and sizes["usual"] == 100 and sizes["others"] == 40
        assert record["auroc"]["others"][record["best"]] > 0.9, "noise is not striped"
        assert 0 <= record["accuracy"] <= 1 and 0 <= record["calibration_error"] <= 1
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if line.startswith("| ⵟ profile ")]) == 2
    cell = f"{ours['auroc']['others']['profile']:.3f}"
    row = next(line for line in text.splitlines() if line.startswith("| ⵟ profile "))
    assert row.split("|")[-3].strip() == cell and "| ⵟ profile:" not in text and "baseline stream" in text


def test_pictures_of_another_size_are_seen_whole(runs, tmp_path):
    pictures = np.zeros((3, 16, 16, 1), np.uint8)
    pictures[:, 0:2] = pictures[:, :, 14:] = 240
    np.savez(tmp_path / "frames.npz", images=pictures, labels=np.arange(3))
    found = foreign(runs["image_run"], str(tmp_path / "frames.npz"), 9, "--outside")
    assert found.shape == (3, 8, 8, 1) and found.dtype == np.uint8
    assert found[:, 0].min() > 150 and found[:, :, -1].min() > 150 and found[:, 3:, :5].max() < 30


def test_texts_and_single_layers(runs, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    argv = ["--runs=aether", f"--outside=other:{runs['text']}", "--usual=100", f"--out={out}", "--layers"]
    assert call(*argv, "--rows=30") == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert list(record["auroc"]) == ["random ids", "shuffled", "other"] and record["inputs"]["other"] == 4
    assert "nll" in record["auroc"]["other"] and 0 <= record["accuracy"] < 1
    assert "| ⵟ profile:blocks.1.mlp.hidden " in capsys.readouterr().out
    ids = foreign(runs["text_run"], runs["text"], 30, "--outside")
    decoded = b"".join(map(runs["text_run"].tokenizer.decode, ids.tolist())).decode()
    assert ids.shape == (4, 16) and Path(runs["text"]).read_text().startswith(decoded)


def test_means_over_runs():
    scores = dict(confidence=0.0, profile=0.0)

    def record(group, best, other):
        part = {"": dict(confidence=0.1, profile=0.0), "a": dict(confidence=0.5, profile=best)}
        part["b"] = dict(confidence=0.7, profile=other)
        return dict(
            group=group, kind=group, best="profile", thresholds=scores, auroc={k: v for k, v in part.items() if k},
            refused=part, accuracy=best, calibration_error=0.0, accuracy_kept=dict(confidence=None, profile=1.0),
        )  # fmt: skip

    text = outside.report([record("runs", 0.8, 0.6), record("runs", 0.6, 0.2)], 0.9)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "ⵟ" in line]
    assert rows[1] == ["ⵟ profile", "0.700 ± 0.100", "0.400 ± 0.200", "0.550 ± 0.150"]
    assert rows[2][1] == "0.100 ± 0.000" and rows[2][-1] == "0.600 ± 0.000" and "90% are kept" in text
    assert rows[4] == ["ⵟ (runs)", "2", "0.700 ± 0.100", "0.000 ± 0.000", "confidence", "–"]
    assert rows[5][-1] == "1.000 ± 0.000" and "baseline" not in text


@pytest.mark.parametrize("text", ["digits", ":digits", "digits:"])
def test_other_data_have_a_name_and_a_path(text):
    with pytest.raises(InputError, match=f"--outside is '{text}'; give NAME:PATH"):
        cli.named(text, "outside")


def test_a_text_shorter_than_a_window_is_refused(runs, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the")
    assert call("--runs=aether", f"--outside=other:{tmp_path / 'short.txt'}") != 0
    assert "short.txt has fewer tokens than the 16 of an input; give a longer text" in capsys.readouterr().err
