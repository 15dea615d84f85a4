"""Reports of tiny runs: every part's numbers against the library's, baselines, wrong wishes, the end of a training."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from aether.config import build, finite
from aether.data.tokenizers import load_tokenizer
from aether.errors import InputError
from aether.evaluate.load import load_run
from aether.explain.attribution import attribute
from aether.explain.capacity import squared_norms
from aether.explain.layers import layers_of
from aether.explain.prototypes import as_images
from aether.report import lazy, prototypes
from aether.report import run as report
from aether.report.run import PARTS, at_the_end, explain_run
from aether.report.subject import Asked, Subject
from aether.train.loop import train

KINDS = ["aether", "aether_resnet", *(pytest.param(k, marks=pytest.mark.slow) for k in ("minibert", "aether_vit"))]


def subject(folder, **asked):
    return Subject(load_run(str(folder)), Asked(**asked), lambda line: None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_network_of_kernels_is_there(explained, kind):
    result, numbers, out = explained(kind)
    images = kind in ("aether_resnet", "aether_vit")
    without = {"lazy", "features"} if kind == "aether_resnet" else set()
    assert set(result["parts"]) == set(PARTS) - (set() if images else {"first_layer"})
    assert {name for name, state in result["parts"].items() if state != "done"} == without
    page = (out / "report.html").read_text()
    for name in result["parts"]:
        assert f'<section id="{name}">' in page
        for picture in numbers[name]["pictures"]:
            assert (out / "explain" / picture).read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 1 + sum(len(numbers[name]["pictures"]) for name in result["parts"])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_capacity_of_each_layer_is_the_networks(explained, run_of, kind):
    table = explained(kind)[1]["capacity"]["tables"][0]["rows"]
    loaded = load_run(str(run_of(kind)))
    layers = layers_of(nnx.merge(loaded.graph, loaded.params))
    for row in table:
        assert row["mean"] == pytest.approx(float(np.mean(squared_norms(layers[row["layer"]]))), rel=1e-5)


def test_the_tokens_of_a_text_carry_their_shares(explained, run_of):
    passages = explained("aether")[1]["attribution"]["passages"]
    looked_at = subject(run_of("aether"), inputs=6, length=12)
    assert len(passages) == len(looked_at.texts) == 6
    for passage, text in zip(passages, looked_at.texts, strict=True):
        found = attribute(looked_at.model, text.ids, text.target, text.position)
        shares = sum(sources.sum(0) for sources in found.sources.values())
        assert [token for token, _ in passage["tokens"]] == [looked_at.words([i]) for i in text.ids]
        np.testing.assert_allclose([share for _, share in passage["tokens"]], shares, rtol=1e-4, atol=1e-5)


def test_texts_of_the_data_end_before_what_they_are_asked_for(run_of):
    looked_at = subject(run_of("aether"), inputs=4, length=12)
    written = looked_at.run.tokenizer.decode(np.concatenate([t.ids for t in looked_at.texts])).decode()
    assert looked_at.x.shape == (4, 12) and all(t.position == 11 for t in looked_at.texts)
    assert "the" in written or "line" in written
    window = looked_at.examples[1][0]["tokens"]
    assert looked_at.texts[0].target == window[12] and (looked_at.texts[0].ids == window[:12]).all()


def test_a_text_of_ones_own_is_taken_apart_at_its_last_token(run_of):
    text = subject(run_of("aether"), texts=("the line",)).texts[0]
    decode = load_run(str(run_of("aether"))).tokenizer.decode
    assert decode(text.ids) == b"the lin" and decode([text.target]) == b"e" and text.position == len(text.ids) - 1


def test_a_baseline_says_what_needs_kernels_and_the_rest_is_done(explained):
    result, numbers, out = explained("gpt2")
    assert result["parts"]["attribution"] == "done" and numbers["attribution"]["passages"]
    assert all("ⵟ" in result["parts"][name] for name in ("prototypes", "capacity", "lazy", "features"))
    assert 'class="trouble"' in (out / "report.html").read_text()


def test_units_that_are_asked_for_are_shown_and_no_others(run_of, tmp_path):
    asked = Asked(inputs=4, length=12, layers=("blocks.1.mlp.hidden",), units=(3, 5))
    explain_run(str(run_of("aether")), ["prototypes"], str(tmp_path), asked=asked, log=lambda line: None)
    tables = json.loads((tmp_path / "explain.json").read_text())["prototypes"]["tables"]
    assert [row["layer"] for row in tables[0]["rows"]] == ["blocks.1.mlp.hidden"]
    assert {row["unit"] for row in tables[1]["rows"]} == {"3", "5"}


def test_the_first_layer_of_a_baseline_stands_beside(run_of, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(prototypes, "draw_kernels", lambda pictures: drawn.append(dict(pictures)) or b"")
    runs = [str(run_of(kind)) for kind in ("aether_resnet", "resnet")]
    for baseline in runs:
        asked = Asked(baseline=baseline)
        explain_run(runs[0], ["first_layer"], str(tmp_path), asked=asked, log=lambda line: None)
    kernels = [np.asarray(subject(run).model.stem.kernel[...]) for run in runs[:1]]
    assert [list(pictures) for pictures in drawn] == [["run (aether_resnet)"], ["run (aether_resnet)", "run (resnet)"]]
    np.testing.assert_allclose(drawn[1]["run (aether_resnet)"], as_images(kernels[0]))


@pytest.mark.parametrize(
    "kind, what, asked, words",
    [
        ("aether", ["nonsense"], {}, "--what has 'nonsense'; it takes some of attribution"),
        ("aether", [], dict(layers=("blocks.9.mlp.hidden",)), "there are blocks.0.mlp.hidden, blocks.1.mlp.hidden"),
        ("aether", [], dict(layers=("blocks.0.mlp.hidden",), units=(99,)), "has 64 units; give one of 0 to 63"),
        ("aether", [], dict(units=(1,)), "--unit is 1, but there is no --layer"),
        ("aether", ["attribution"], dict(texts=("the line " * 9,)), "takes 2 to 16"),
        ("aether_resnet", [], dict(texts=("the",)), "reads images; leave it out"),
        ("aether", ["outside"], dict(inputs=2), "There are 2 inputs inside; give 3 at least"),
        ("aether", ["outside"], dict(outside={"x": "no such.txt"}), "no such.txt does not exist; set --outside"),
        ("aether_resnet", ["first_layer"], dict(baseline="no such"), "--baseline is no such, but there is no run"),
        ("gpt2", [], dict(layers=("blocks.0.mlp.hidden",)), "none: the network has no ⵟ units"),
    ],
)
def test_a_wish_that_cannot_be_met_is_told_in_one_sentence(run_of, tmp_path, kind, what, asked, words):
    try:
        parts = explain_run(str(run_of(kind)), what, str(tmp_path), asked=Asked(**asked), log=lambda line: None)[
            "parts"
        ]
        assert any(words in state for state in parts.values()), parts
    except InputError as e:
        assert words in str(e)
        assert not list(tmp_path.iterdir())


def test_the_report_at_the_end_has_the_parts_of_the_config(run_of, capsys):
    folder = run_of("aether")
    config = load_run(str(folder)).config
    at_the_end(config, str(folder))()
    page = (folder / "report.html").read_text()
    assert '<section id="config">' in page and '<section id="capacity">' not in page
    with_parts = dataclasses.replace(config, train=dataclasses.replace(config.train, explain="capacity"))
    at_the_end(with_parts, str(folder))()
    assert '<section id="capacity">' in (folder / "report.html").read_text()
    assert f"report: {folder}/report.html" in capsys.readouterr().err


def test_a_part_at_the_end_that_there_is_not_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"train.explain has 'all'; it takes some of attribution"):
        at_the_end(build(dict(train=dict(explain="capacity, all"))), str(tmp_path))


def test_a_report_that_fails_ends_no_run(tmp_path, capsys):
    at_the_end(build({}), str(tmp_path / "nothing"))()
    assert "warning: the report is not what was asked for: InputError" in capsys.readouterr().err


def test_of_several_processes_the_first_one_writes_and_takes_nothing_apart(run_of, monkeypatch):
    folder = run_of("aether")
    (folder / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(report, "explain_run", None)  # nobody calls it
    write = at_the_end(build(dict(train=dict(explain="capacity"))), str(folder))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write()
    assert not (folder / "report.html").exists()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    write()
    assert (folder / "report.html").exists()


def test_as_much_is_looked_at_as_makes_the_same_work_in_every_network(run_of):
    one = subject(run_of("aether"), inputs=50, length=12)
    size = sum(p.size for p in jax.tree.leaves(one.run.params))
    assert one.few(10**9) == 50 and one.few(0) == 8
    assert one.few(20.5 * 12 * size / 1.6e8) == 20 and one.few(3 * 12 * size / 1.6e8) == 8


def test_batches_are_no_larger_than_what_is_scored(run_of, monkeypatch):
    monkeypatch.setattr(lazy, "SCORED", 0)
    one = subject(run_of("aether"), inputs=50, length=12)
    one.run = dataclasses.replace(one.run, config=dataclasses.replace(
        one.run.config, data=dataclasses.replace(one.run.config.data, batch_size=32)))  # fmt: skip
    (batch,) = lazy._batches(one)
    assert batch["tokens"].shape == (8, 13) and batch["mask"].shape == (8, 12)


def test_inputs_are_spread_over_all_of_the_data(run_of):
    one = subject(run_of("aether"), inputs=5, length=12)
    examples = one.examples[1]
    at = [next(i for i in range(len(examples)) if (examples[i]["tokens"][:12] == x).all()) for x in one.x]
    assert len(examples) > 40 and at[0] < 12 and at[-1] > len(examples) - 12 and at == sorted(at)


def test_characters_of_several_tokens_are_one_piece(run_of):
    one = subject(run_of("aether"))
    one.run = dataclasses.replace(one.run, tokenizer=load_tokenizer("bytes"))
    ids = [*"né".encode(), 0xFF, *"あ".encode(), one.run.tokenizer.eot, 0xE3]
    assert one.pieces(ids, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]) == [
        ("n", 1.0), ("é", 5.0), ("\ufffd", 4.0), ("あ", 18.0), ("<|endoftext|>", 8.0), ("\ufffd", 9.0)
    ]  # fmt: skip
    assert one.words(ids[:3]) == "né"


def test_capacity_over_training_skips_a_checkpoint_that_cannot_be_read(run_of, tmp_path):
    config = load_run(str(run_of("aether"))).config
    keep = dataclasses.replace(config.checkpoint, every=2, keep_last=9)
    how = dataclasses.replace(config.train, steps=6, eval_every=0, sample_tokens=0)
    train(dataclasses.replace(config, checkpoint=keep, train=how), str(tmp_path / "run"))
    for file in (tmp_path / "run/checkpoints/4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    lines = []
    out = str(tmp_path / "out")
    explain_run(str(tmp_path / "run"), ["capacity"], out, asked=Asked(inputs=4, length=12), log=lines.append)
    numbers = json.loads((tmp_path / "out/explain.json").read_text())["capacity"]
    table = next(t["rows"] for t in numbers["tables"] if "checkpoints" in t["caption"])
    assert [row["step"] for row in table] == [2, 6] and "capacity_training.png" in numbers["pictures"]
    assert any("step 4 is left out" in line for line in lines)
    last = next(row for row in numbers["tables"][0]["rows"] if row["layer"] == "blocks.1.mlp.hidden")
    assert table[1]["blocks.1.mlp.hidden"] == pytest.approx(last["mean"])


def test_other_data_are_looked_at_and_told_from(run_of, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("if it can it can it can if it can it can. " * 40)
    asked = Asked(inputs=9, length=12, data=str(other), outside={"other": str(other)})
    explain_run(str(run_of("aether")), ["outside"], str(tmp_path), asked=asked, log=lambda line: None)
    numbers = json.loads((tmp_path / "explain.json").read_text())
    rows = {row["score"]: row for row in numbers["outside"]["tables"][0]["rows"]}
    assert numbers["data"] == str(other) and set(rows["nll"]) == {"score", "random ids", "shuffled", "other"}
    assert rows["nll"]["random ids"] == 1.0
    assert f"step 30, {other}" in (tmp_path / "report.html").read_text()


def test_numbers_that_are_none_are_null(tmp_path):
    assert finite({"rows": [{"x": float("nan")}, (1.0, float("inf"))]}) == {"rows": [{"x": None}, [1.0, None]]}


def test_a_folder_that_cannot_be_written_is_told_before_the_work(run_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out is .*file is a file; give a folder"):
        explain_run(str(run_of("aether")), ["capacity"], str(tmp_path / "file"), log=lambda line: None)
