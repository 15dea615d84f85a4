"""What `launch.harness` hands over to lm-evaluation-harness."""

import json
import sys
import types

import pytest

from launch import cli, harness


@pytest.fixture
def handed(monkeypatch):
    """The command lines that the harness is called with."""
    calls = []
    ours, theirs = types.ModuleType("aether.evaluate.harness"), types.ModuleType("lm_eval.__main__")
    ours.AetherLM, theirs.cli_evaluate = object, lambda: calls.append(list(sys.argv))
    monkeypatch.setitem(sys.modules, "aether.evaluate.harness", ours)
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", theirs)
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return calls


def run(*argv: str) -> int:
    ours, theirs = harness.divided(list(argv))
    return cli.run(lambda args: harness.main(args, theirs), harness.FLAGS, harness.__doc__, ours)


@pytest.mark.parametrize("words", [["--tasks", "a,b", "--limit=3"], ["run", "--tasks", "a,b", "--limit=3"]])
def test_the_model_is_the_run_s_and_the_rest_is_theirs(handed, words):
    assert run("--workdir=runs/a, b", "--step=0", "--average=last:2", "--", *words) == 0
    ((name, *rest),) = handed
    assert (name, rest[:2], rest[2]) == ("lm_eval", ["--model", "aether"], "--model_args")
    assert json.loads(rest[3]) == dict(workdir="runs/a, b", step=0, average="last:2")
    assert rest[4:] == ["--tasks", "a,b", "--limit=3"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--", "--tasks", "a"], "--workdir is missing"),
        (["--workdir=w", "--", "--model=hf"], "--model=hf is given, but the model is that of --workdir"),
        (["--workdir=w", "--tasks", "a"], "There is no flag --tasks"),
    ],
)
def test_mistakes_are_one_sentence(handed, capsys, argv, says):
    assert run(*argv) == 2 and handed == []
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    monkeypatch.delitem(sys.modules, "aether.evaluate.harness", raising=False)
    for name in ("lm_eval", "lm_eval.models", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--workdir=runs/a", "--", "--tasks", "a") == 2
    assert "pip install -e '.[harness]'" in capsys.readouterr().err
