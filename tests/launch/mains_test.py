"""The three mains, with what they call replaced: what they hand over, what they print, what they refuse."""

import json
import subprocess
import sys
import types

import pytest

from aether.config import Config
from launch import STARTED, cli, evaluate, generate, train


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


@pytest.fixture
def replace(monkeypatch):
    """Put `function` where a main imports it from, and return the list of calls it gets."""

    def replace(module: str, name: str, result=None) -> list:
        calls: list = []

        def function(*args, **kwargs):
            calls.append((args, kwargs))
            return result

        fake = types.ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)
        for parent in ("aether.train", "aether.report", "aether.evaluate", "aether.evaluate.tasks", "aether.generate"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        return calls

    return replace


def run(main, *argv: str) -> int:
    return cli.run(main.main, main.FLAGS, main.__doc__, list(argv))


@pytest.fixture
def trained(replace):
    """The calls of the training and of what writes its report."""
    reported = []
    at_the_end = replace("aether.report.run", "at_the_end", result=lambda: reported.append("now"))
    yield replace("aether.train.loop", "train", result=True), at_the_end
    assert reported == ["now"]


def test_train_hands_over_the_checked_config(trained):
    calls, reports = trained
    assert run(train, "--config.train.steps=5", "--config=configs/quickstart.py", "--workdir=runs/mine") == 0
    (((config, workdir), kwargs),) = calls
    assert isinstance(config, Config) and config.train.steps == 5 and config.data.path == "python:stdlib"
    assert workdir == "runs/mine" and kwargs == {"started": STARTED}
    assert reports == [((config, "runs/mine"), {})]


def test_train_names_the_workdir_after_the_config(trained):
    calls, _ = trained
    assert run(train, "--config=configs/quickstart.py") == 0
    assert calls[0][0][1] == "runs/quickstart"


def test_train_refuses_before_anything_is_loaded(replace, capsys):
    calls = replace("aether.train.loop", "train")
    assert run(train, "--config=configs/quickstart.py", "--config.train.steps=-1") == 2
    assert run(train) == 2
    assert calls == [] and "train.steps is -1" in capsys.readouterr().err


def test_evaluate_prints_one_line_of_json(replace, capsys):
    calls = replace("aether.evaluate.run", "evaluate_run", {"step": 3, "loss": 1.25, "perplexity": float("inf")})
    assert run(evaluate, "--workdir=w", "--step=3", "--data=x.txt", "--batches=2") == 0
    assert calls == [(("w",), {"step": 3, "data": "x.txt", "batches": 2, "pictures": None, "average": "auto"})]
    out = capsys.readouterr().out
    assert out.endswith("\n") and json.loads(out.splitlines()[-1]) == {"step": 3, "loss": 1.25, "perplexity": None}


def test_evaluate_hands_tasks_over_and_prints_a_table(replace, capsys):
    shown = replace("aether.evaluate.tasks.table", "table", "the table")
    calls = replace(
        "aether.evaluate.tasks.run", "evaluate_tasks", {"step": 3, "tasks": {"pairs-x": {"a": float("nan")}}}
    )
    words = ["--task=pairs:x.jsonl", "--task=sliding:y", "--stride=4", "--step=3", "--average=ema"]
    assert run(evaluate, "--workdir=w", *words) == 0
    rest = dict(step=3, stride=4, average="ema")
    assert calls == [(("w", ["pairs:x.jsonl", "sliding:y"]), rest)] and shown[0][0][0]["pairs-x"]
    assert capsys.readouterr().out.splitlines() == ["the table", '{"step": 3, "tasks": {"pairs-x": {"a": null}}}']


def test_evaluate_defaults(replace):
    calls = replace("aether.evaluate.run", "evaluate_run", {})
    assert run(evaluate, "--workdir=w") == 0
    assert calls == [(("w",), {"step": None, "data": None, "batches": 0, "pictures": None, "average": "auto"})]
    assert run(evaluate) == 2 and run(evaluate, "--workdir=w", "--step=-1") == 2
    assert len(calls) == 1


@pytest.fixture
def generated(replace):
    """Put a run and what it writes in place; return the calls of `load_run`, `Decoder` and `text_streams`."""

    def generated(streams: list) -> tuple[list, list, list]:
        tokenizer = types.SimpleNamespace(eot=9, vocab_size=10)
        config = types.SimpleNamespace(data=types.SimpleNamespace(context=64), model=types.SimpleNamespace(task="lm"))
        run = types.SimpleNamespace(graph="graph", params="params", config=config, tokenizer=tokenizer)
        loads = replace("aether.evaluate.load", "load_run", run)
        decoders = replace("aether.generate.decode", "Decoder", "decoder")
        return loads, decoders, replace("aether.generate.text", "text_streams", streams)

    return generated


def test_generate_streams_the_pieces(generated, capsys):
    loads, decoders, calls = generated([iter(["ma", "in("])])
    assert run(generate, "--workdir=w", "--prompt=def ", "--temperature=0", "--top_k=5", "--seed=7") == 0
    assert capsys.readouterr().out == "def main(\n"
    assert loads == [(("w", None), {"average": "auto"})] and decoders == [(("graph", 64, 9, 10), {})]
    (((decoder, params, _, prompt, max_tokens), asked),) = calls
    assert (decoder, params, prompt, max_tokens) == ("decoder", "params", "def ", 200)
    assert asked == dict(temperature=0.0, top_k=5, top_p=1.0, seed=7, num=1)


def test_generate_separates_samples(generated, capsys):
    loads, _, _ = generated([["a"], ["b", "c"]])
    assert run(generate, "--workdir=w", "--num=2", "--step=4") == 0
    assert capsys.readouterr().out == "--- sample 1 of 2 ---\na\n--- sample 2 of 2 ---\nbc\n"
    assert loads == [(("w", 4), {"average": "auto"})]


@pytest.mark.parametrize(
    "flag",
    [
        *("temperature=-0.1", "temperature=nan", "temperature=inf", "top_p=0", "top_p=1.01", "top_p=nan", "top_k=-1"),
        *("max_tokens=0", "num=0", "seed=-1", "step=-1", "workdir="),
    ],
)
def test_generate_checks_its_ranges(generated, capsys, flag):
    calls, _, _ = generated([])
    assert run(generate, "--workdir=w", f"--{flag}") == 2
    err = capsys.readouterr().err
    assert calls == [] and err.startswith(f"error: --{flag.split('=')[0]} is ") and err.count("\n") == 1


def test_generate_ends_quietly_when_nobody_reads():
    code = "from launch import generate; generate.show([['word\\n'] * 100_000], 1)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"word\n"
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


def test_generate_flushes_each_piece(replace, monkeypatch):
    events: list[str] = []

    class Terminal:
        def write(self, text: str) -> None:
            events.append(text)

        def flush(self) -> None:
            events.append("flush")

    monkeypatch.setattr(sys, "stdout", Terminal())
    generate.show([["a", "b"]], 1)
    assert [e for e in events if e] == ["a", "flush", "b", "flush", "\n", "flush"]
