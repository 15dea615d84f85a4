"""Config files and `--config.KEY=VALUE`: types, new names, and one clear sentence for every mistake."""

from pathlib import Path

import pytest

from aether.errors import InputError
from launch.overrides import load_config, make_config

HEAD = "from aether.config import default_config\n"
EMPTY = HEAD + "def get_config():\n    return default_config()\n"


@pytest.fixture
def changed(write):
    path = write(EMPTY)
    return lambda *overrides: make_config(path, overrides)


@pytest.fixture
def write(tmp_path):
    def write(source: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=12", 12),
        ("train.steps=1e3", 1000),
        ("mesh.data=-1", -1),
        ("optim.eps=3e-4", 3e-4),
        ("optim.clip=2", 2.0),
        ("model.spherical=false", False),
        ("model.spherical=1", True),
        ("model.spherical=False", False),
        ("train.sample_prompt=a = b == c", "a = b == c"),
        ("train.sample_prompt=", ""),
        ("train.wandb=12", "12"),
    ],
)
def test_types_come_from_the_schema(changed, override, value):
    section, name = override.split("=")[0].split(".")
    got = getattr(getattr(changed(override), section), name)
    assert got == value and type(got) is type(value)


def test_dictionaries_take_new_names(changed):
    config = changed(
        "data.validation.my-set/a.b=texts/x=y.txt",
        "data.mixture.a=one",
        "data.mixture.b=two",
        "data.weights.a=0.3",
        r"optim.lr_scale.blocks\.0/.*=0.1",
    )
    assert config.data.validation == {"my-set/a.b": "texts/x=y.txt"}
    assert config.data.mixture == {"a": "one", "b": "two"}
    assert config.data.weights == {"a": 0.3}
    assert config.optim.lr_scale == {r"blocks\.0/.*": 0.1}


def test_an_empty_value_empties_a_dictionary(changed):
    assert changed("data.validation.a=x", "data.validation=", "data.validation.b=y").data.validation == {"b": "y"}


def test_the_last_word_wins(changed):
    assert changed("train.steps=1", "train.steps=2").train.steps == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["train.stepz", "train.steps"]),
        ("steps=3", ["steps", "train.steps"]),
        ("nothing.like.it=3", ["nothing.like.it", "model", "data", "optim", "train"]),
        ("train.steps.more=3", ["train.steps.more"]),
        ("train=3", ["There is no key train"]),
        ("train.steps=abc", ["train.steps", "'abc'", "whole number"]),
        ("train.steps=1.5", ["train.steps", "'1.5'", "whole number"]),
        ("train.steps=1e30", ["train.steps", "'1e30'", "whole number"]),
        ("train.steps=inf", ["train.steps", "'inf'", "whole number"]),
        ("train.steps=", ["train.steps", "''", "whole number"]),
        ("optim.eps=small", ["optim.eps", "'small'", "number"]),
        ("optim.clip=nan", ["optim.clip", "nan", "finite"]),
        ("model.spherical=maybe", ["model.spherical", "'maybe'", "true or false"]),
        ("data.weights.a=much", ["data.weights.a", "'much'", "number"]),
        ("data.validation=x.txt", ["data.validation", "'x.txt'", "--config.data.validation.NAME=VALUE"]),
        ("train.steps=0", ["train.steps", "0", "at least 1"]),
        ("model.kind=llama", ["model.kind", "'llama'", "aether, gpt2"]),
    ],
)
def test_mistakes_name_key_value_and_cure(changed, override, parts):
    with pytest.raises(InputError) as caught:
        changed(override)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_and_its_overrides(write):
    path = write(HEAD + "def get_config():\n    c = default_config()\n    c.train.steps = 7\n    return c\n")
    assert make_config(path, []).train.steps == 7
    assert make_config(path, ["train.steps=9"]).train.steps == 9
    assert make_config(path, []).train.steps == 7


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1\n", ["has no get_config()"]),
        ("def get_config(:\n", ["line 1", "SyntaxError"]),
        ("\nimport no_such_module\n", ["line 2", "ModuleNotFoundError", "no_such_module"]),
        ("def get_config():\n    return 1 / 0\n", ["line 2", "ZeroDivisionError"]),
        ("def f():\n    return 1 / 0\ndef get_config():\n    return f()\n", ["line 2", "ZeroDivisionError"]),
        ("def get_config():\n    return {}\n", ["returned dict", "ConfigDict"]),
        ("def get_config():\n    pass\n", ["returned NoneType", "ConfigDict"]),
        (HEAD + "c = default_config()\nc.train.steps = 'x'\n", ["line 3", "TypeError"]),
        (EMPTY.replace("return", "c = ") + "    c.train.stepz = 1\n    return c\n", ["train.stepz", "train.steps"]),
        (EMPTY.replace("return", "c = ") + "    c.trian = {}\n    return c\n", ["trian", "train"]),
    ],
)
def test_broken_files(write, source, parts):
    path = write(source)
    with pytest.raises(InputError) as caught:
        make_config(path, [])
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(write, tmp_path):
    right = write(EMPTY, "quickstart.py")
    wrong = str(tmp_path / "quikstart.py")
    with pytest.raises(InputError) as caught:
        load_config(wrong)
    assert wrong in str(caught.value) and f"did you mean {right}?" in str(caught.value)
    with pytest.raises(InputError, match="no such file; give a python file"):
        load_config(str(Path(wrong) / "far" / "away.py"))


def test_a_section_that_is_not_a_group(write):
    path = write("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'train': 3})\n")
    for overrides in ([], ["train.steps=3"]):
        with pytest.raises(InputError, match="train is 3"):
            make_config(path, overrides)
