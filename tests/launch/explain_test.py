"""What `launch.explain` hands over, and what it refuses."""

import json
import sys
import types

import pytest

from aether.report.subject import Asked
from launch import cli, explain


@pytest.fixture
def calls(monkeypatch):
    """The calls of what explains, in place of it."""
    found: list = []
    fake = types.ModuleType("aether.report.run")
    fake.explain_run = lambda *args, **kwargs: found.append((args, kwargs)) or {"report": "page"}
    monkeypatch.setitem(sys.modules, "aether.report.run", fake)
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    return found


def run(*argv):
    return cli.run(explain.main, explain.FLAGS, explain.__doc__, list(argv))


def test_every_flag_goes_where_it_belongs(calls, capsys):
    words = "--workdir=runs/a --what=lazy,capacity --out=b --step=7 --average=none --data=d.txt --inputs=5 --length=9"
    words += " --text=one --text=two --layer=head --unit=3 --unit=4 --outside=x:y.txt --baseline=runs/c"
    assert run(*words.split()) == 0
    (((workdir, what, out), how),) = calls
    assert (workdir, what, out) == ("runs/a", ["lazy", "capacity"], "b")
    assert how.pop("asked") == Asked(
        data="d.txt", inputs=5, length=9, texts=("one", "two"), layers=("head",), units=(3, 4),
        outside={"x": "y.txt"}, baseline="runs/c",
    )  # fmt: skip
    assert how.pop("log") and how == dict(step=7, average="none")
    assert json.loads(capsys.readouterr().out) == {"report": "page"}


def test_by_default_all_of_a_run_is_explained_into_its_folder(calls):
    assert run("--workdir=runs/a") == 0
    (((workdir, what, out), how),) = calls
    assert (workdir, what, out) == ("runs/a", [], None) and how["asked"] == Asked()


@pytest.mark.parametrize("words, said", [([], "--workdir is missing"), (["--workdir=a", "--outside=x"], "NAME:PATH")])
def test_what_is_missing_is_told(calls, capsys, words, said):
    assert run(*words) == 2 and said in capsys.readouterr().err and not calls
