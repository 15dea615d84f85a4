"""What the README tells people to type, run or look at exists: commands parse, knobs and files are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from aether.config import build, default_config
from launch import cli, overrides

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = [
    "pip install -e . && python -m launch.train --config=configs/quickstart.py",
    'pip install -e ".[test]" && pytest',
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the commands of the shell blocks, one each, without comments."""
    text = "\n".join(blocks("(?:sh|bash|shell)")).replace("\\\n", " ")
    lines = (" ".join(line.split(" #")[0].split()) for line in text.splitlines())
    return [part for line in lines if line and line[0] != "#" for part in re.split(r" && | \| |; ", line)]


def mains() -> list[list[str]]:
    """Return the words of the commands that start something of ours, from `launch.NAME` or `tools/NAME.py` on."""
    found = []
    for command in commands():
        words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
        if words[0] in ("python", "python3"):
            found.append(words[2:] if words[1] == "-m" else words[1:])
    return found


def test_the_first_screen_has_the_two_commands_and_the_picture():
    first = TEXT[: TEXT.index("\n## ")]
    assert all(command in first for command in SET_UP)
    assert len(re.findall(r"!\[.*?\]\(.*?\)", first)) == 1


def parts(words: list[str]) -> list[list[str]]:
    """Return a command and, if it has a `--`, the training that stands after it, unless it is the harness's words."""
    if "--" not in words:
        return [words]
    before, after = words[: words.index("--")], words[words.index("--") + 1 :]
    return [before] if words[0] == "launch.harness" else [before, ["launch.train", *after]]


@pytest.mark.parametrize("words", [part for words in mains() for part in parts(words)], ids=" ".join)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    name = words[0].removesuffix(".py").replace("/", ".")
    assert (ROOT / (name.replace(".", "/") + ".py")).is_file(), words[0]
    values = importlib.import_module(name).FLAGS
    cli.parse(values, words[1:])
    if name == "tools.bench":  # which brings its own configs, and takes overrides of them
        values["config"].value = values["config"].value or "configs/quickstart.py"
    if "config" in values and "--report" not in words:
        cli.config_of(values)


def test_knobs_in_the_prose_exist():
    """Those written out, and those after one of them in short: `--config.train.ema=0.9`, `.z_loss=1e-4`."""
    for line in TEXT.splitlines():
        section, values = "", default_config().to_dict()
        for words in re.findall(r"`([^`]+)`", line):
            short = [f"{section}{words}"] if section and re.match(r"\.\w+=", words) else []
            for knob in re.findall(r"--config\.(\S+)", words) + short:
                key, equals, value = knob.partition("=")
                section = key.split(".")[0]
                if equals:
                    overrides.apply(values, key, value)
        build(values)


def test_what_it_points_at_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if "://" not in link]
    files = re.findall(r"`((?:aether|configs|launch|tools|tests|docs)/[\w./-]+\.\w+)`", TEXT)
    missing = [name for name in links + files if not (ROOT / name).exists()]
    assert not missing


def test_extras_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\][`\"]", TEXT))
    assert named and named <= set(extras)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code):
    given = "import jax\nx = jax.numpy.ones((2, 768))\n"
    exec(compile(given + code, "README.md", "exec"), {})
