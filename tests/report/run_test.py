"""Reports of tiny runs: every part's numbers against the library's, baselines, wrong wishes, the end of a training."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from aether.config import build
from aether.errors import InputError
from aether.evaluate.load import load_run
from aether.explain.attribution import attribute
from aether.explain.capacity import squared_norms
from aether.explain.layers import layers_of
from aether.report import run as report
from aether.report.run import PARTS, at_the_end, explain_run
from aether.report.subject import Asked, Subject

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


@pytest.mark.parametrize("kind", KINDS)
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
        assert [token for token, _ in passage["tokens"]] == [looked_at.token(i) for i in text.ids]
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


def test_the_first_layer_of_a_baseline_stands_beside(run_of, tmp_path):
    asked = Asked(baseline=str(run_of("resnet")))
    sizes = []
    for one in (Asked(), asked):
        explain_run(str(run_of("aether_resnet")), ["first_layer"], str(tmp_path), asked=one, log=lambda line: None)
        sizes.append(len((tmp_path / "explain/first_layer.png").read_bytes()))
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize(
    "kind, what, asked, words",
    [
        ("aether", ["nonsense"], {}, "--what has 'nonsense'; it takes some of attribution"),
        ("aether", [], dict(layers=("blocks.9.mlp.hidden",)), "there are blocks.0.mlp.hidden, blocks.1.mlp.hidden"),
        ("aether", [], dict(layers=("blocks.0.mlp.hidden",), units=(99,)), "has 64 units; give one of 0 to 63"),
        ("aether", [], dict(units=(1,)), "--unit is 1, but there is no --layer"),
        ("aether", ["attribution"], dict(texts=("the line " * 9,)), "takes 2 to 16"),
        ("aether_resnet", [], dict(texts=("the",)), "reads images; leave it out"),
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
    assert "warning: no report: InputError" in capsys.readouterr().err


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
