"""Every shipped config: it builds, resolves, keeps to the schema, and documents itself."""

import ast
import tomllib
from pathlib import Path

import pytest

from aether.config import Pictures, build, knobs
from aether.config.kinds import BASELINES, OPEN
from aether.models import describe_model
from aether.train.optim import learning_rate_scales
from launch.overrides import load_config, make_config

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.py"))
VOCABULARY = {"bytes": 257, "chars": 66}


def values(path: Path) -> dict:
    return load_config(str(path))


def test_there_are_configs():
    assert {"quickstart", "shakespeare_char"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("baseline", [False, True])
def test_builds_and_resolves(path, baseline):
    config = make_config(str(path), [])
    if baseline:
        config = make_config(str(path), [f"model.kind={BASELINES[config.model.kind]}"])
    images = config.model.task == "classify"
    pictures = Pictures(classes=10, size=config.image.size or 32, channels=3, mean=0.5, std=0.25) if images else None
    resolved = config.resolved(0 if images else VOCABULARY.get(config.data.tokenizer, 50257), pictures)
    for key, f in knobs():
        section, name = key.split(".")
        here = name in OPEN[resolved.model.family] if section == "model" else images or section != "image"
        decided = getattr(getattr(resolved, section), name) not in (0, "auto")
        assert decided or not (f.metadata["auto"] and here), key
    assert resolved.optim.warmup_steps < resolved.train.steps


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_call_starts_afresh(path):
    first = values(path)
    first["train"]["steps"] = -1
    assert values(path)["train"]["steps"] > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_says_what_command_time_and_result(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for label in ("What:", "Command:", "Time:", "Result:"):
        assert f"\n{label} " in doc, f"{path.name} lacks a line {label}"
    assert f"python -m launch.train --config=configs/{path.name}" in doc
    for key in ("path", "tokenizer"):
        left_open = values(path)["data"][key] in ("", "gpt2:")
        assert left_open == (f"--config.data.{key}=" in doc), f"{path.name}: data.{key} left open <=> in the command"


def test_cases_of_studies_build_and_their_expressions_find_parameters():
    for path in sorted((FOLDER / "studies").glob("*.toml")):
        cases = tomllib.loads(path.read_text(encoding="utf-8"))
        first = next(iter(cases.values()))
        assert len(cases) > 1
        assert not first or first["model.kind"] == "gpt2", (
            f"{path.name} begins with the recipe as it is, or is the baseline's"
        )
        for name, entries in cases.items():
            words = ["data.path=x", *(f"{key}={value}" for key, value in entries.items())]
            config = make_config(str(FOLDER / "shakespeare_char.py"), words).resolved(66)
            learning_rate_scales(config.optim, describe_model(config)[1], config.model)
            assert config != make_config(str(FOLDER / "shakespeare_char.py"), words[:1]).resolved(66) or not entries, (
                name
            )


def test_quickstart_needs_nothing_else():
    config = build(values(FOLDER / "quickstart.py"))
    assert (config.data.path, config.data.tokenizer, config.model.dtype) == ("python:stdlib", "bytes", "float32")


def test_shakespeare_is_the_published_setting():
    config = build(values(FOLDER / "shakespeare_char.py")).resolved(66)
    model, data, optim = config.model, config.data, config.optim
    assert (model.layers, model.heads, model.width, model.dropout) == (4, 4, 128, 0.0)
    assert (model.position, model.head, model.linear_bias, model.dtype) == ("learned", "untied", "no", "float32")
    assert (data.tokenizer, data.context, data.batch_size, data.validation_fraction) == ("chars", 64, 12, 0.1)
    assert (config.train.steps, optim.warmup_steps, optim.final_fraction, optim.clip) == (2000, 100, 0.1, 1.0)
    assert (optim.schedule, optim.beta2, optim.weight_decay) == ("cosine", 0.99, 0.1)
