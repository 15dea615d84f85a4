"""A run scored on tasks through the main: table, JSON, files, TensorBoard; and what is refused."""

import json
import math
import shutil
import struct

import jax
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.evaluate.tasks.run import evaluate_tasks, labelled
from launch import cli, evaluate

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 3
LINES = dict(
    lambada=[dict(context="The quick brown", continuation="fox"), dict(context="a", continuation="b c")],
    choice=[dict(query="What?", choices=["this", "that one"], gold=1), dict(query="", choices=["a", "b"], gold=0)],
    pairs=[dict(sentence_good="It is.", sentence_bad="It are."), dict(sentence_good="xy", sentence_bad="yx")],
)


@pytest.fixture
def files(tmp_path):
    for name, lines in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "text.txt").write_text(TEXT)
    return {name: tmp_path / f"{name}.jsonl" for name in LINES} | dict.fromkeys(
        ("documents", "sliding"), tmp_path / "text.txt"
    )


@pytest.fixture
def run(bytes_run, tmp_path):
    return shutil.copytree(bytes_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "tensorboard"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


def call(*argv: str) -> int:
    return cli.run(evaluate.main, evaluate.FLAGS, evaluate.__doc__, list(argv))


def read_events(folder):
    """Return (step, tag, value) of TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            yield from ((event.step, v.tag, v.simple_value) for v in event.summary.value)


def test_several_tasks_in_one_call(run, files, loaded, capsys):
    words = [f"--task={name}:{file}" for name, file in files.items()]
    assert call(f"--workdir={run}", *words, words[0], "--stride=5") == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert (result["step"], result["average"]) == (7, "none") and out[0].split()[:2] == ["task", "metric"]
    tasks = result["tasks"]
    assert list(tasks) == ["lambada-lambada", "choice-choice", "pairs-pairs", "documents-text", "sliding-text"]
    assert [line.split()[0] for line in out[1:-1] if not line.startswith(" ")] == list(tasks)
    assert tasks["sliding-text"]["stride"] == 5 and tasks["documents-text"]["tokens"] == len(TEXT)
    nats = -reference(loaded, [256, *TEXT.encode()])
    assert tasks["documents-text"]["token_perplexity"] == pytest.approx(math.exp(nats / len(TEXT)), rel=1e-5)
    assert tasks["documents-text"]["bits_per_byte_stderr"] is None

    for name, task in tasks.items():
        assert json.loads((run / f"evaluation/{name}-7.json").read_text()) == dict(step=7, average="none") | task
    scalars = {(step, tag): value for step, tag, value in read_events(run / "tensorboard")}
    metrics = {f"{name}/{k.removesuffix('_stderr')}" for name, task in tasks.items() for k in task if "stderr" in k}
    assert {tag for _, tag in scalars} == metrics and {step for step, _ in scalars} == {7}
    assert scalars[7, "sliding-text/perplexity"] == pytest.approx(tasks["sliding-text"]["perplexity"])


def reference(run, ids):
    """Return log p of ids behind the first, in windows of the context, the last one full."""
    model = nnx.merge(run.graph, jax.device_put(run.params, jax.devices()[0]))
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.logits(model(ids[None])[0])[0]))
    ids, n, total = np.array(ids), run.config.data.context, 0.0
    for begin in range(1, len(ids), n):
        end = min(begin + n, len(ids))
        seen = ids[end - n - 1 : end]
        log_p = np.asarray(forward(seen[:-1]), np.float64)[np.arange(n), seen[1:]]
        total += log_p[-(end - begin) :].sum()
    return total


def test_an_average_that_was_asked_for_is_in_the_names(run, files):
    found = evaluate_tasks(str(run), [f"pairs:{files['pairs']}"], average="last:1")
    assert found["average"] == "last:1" and list(found["tasks"]) == ["pairs-pairs"]
    assert [p.name for p in (run / "evaluation").iterdir()] == ["pairs-pairs-last1-7.json"]


def test_a_folder_that_cannot_be_written_is_a_warning(run, files, capsys, monkeypatch):
    (run / "evaluation").write_text("a file in the way")
    assert call(f"--workdir={run}", f"--task=pairs:{files['pairs']}") == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["tasks"]["pairs-pairs"]["examples"] == 2
    assert err.startswith("warning: the results are not kept in the run's folder: ") and err.count("\n") == 1


def test_nothing_is_scored_before_all_is_read(run, files, capsys, monkeypatch):
    from aether.evaluate.likelihood import Scorer

    monkeypatch.setattr(Scorer, "__call__", lambda *a: pytest.fail("scored"))
    with files["choice"].open("a") as f:
        f.write('{"query": "?"}\n')
    words = [f"--task={name}:{files[name]}" for name in ("pairs", "choice")]
    assert call(f"--workdir={run}", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not (run / "evaluation").exists()
    assert f"--task=choice:{files['choice']}: {files['choice']} line 3: it has no 'choices'" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task=blimp:x"], ["'blimp:x'", "no task 'blimp'", "lambada, choice, pairs, documents, sliding"]),
        (["--task=choice"], ["'choice'", "NAME:PATH", "--task=choice:my.jsonl"]),
        (["--task=choice:nowhere.jsonl"], ["--task=choice:nowhere.jsonl", "does not exist"]),
        (["--task=documents:nowhere"], ["--task=documents:nowhere", "nowhere does not exist"]),
        (["--task=choice:a/x.jsonl", "--task=choice:b/x.jsonl"], ["both be called choice-x", "rename one"]),
        (["--task=choice:x", "--stride=3"], ["--stride is 3", "sliding:PATH"]),
        (["--stride=3"], ["--stride is 3", "sliding:PATH"]),
        (["--stride=0"], ["--stride is '0'"]),
        (["--task=choice:x", "--data=y"], ["--data and --task"]),
        (["--task=choice:x", "--average=mean"], ["--average is 'mean'"]),
        (["--task=choice:x", "--workdir=nowhere"], ["--workdir is nowhere"]),
    ],
)
def test_mistakes_are_one_sentence(bytes_run, capsys, flags, words):
    assert call(f"--workdir={bytes_run}", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err


def test_masked_models_are_refused(write_bytes_run, tmp_path, files):
    folder = write_bytes_run(tmp_path / "bert", model=dict(kind="bert"))
    with pytest.raises(InputError, match="--task takes a language model, .* is a run of bert"):
        evaluate_tasks(folder, [f"pairs:{files['pairs']}"])


def test_labels_are_names_of_task_and_file():
    words = [
        "pairs:gs://b/dir/anaphor gender.jsonl.gz",
        "documents:texts/",
        "documents:python:stdlib",
        "choice:é.jsonl",
    ]
    assert list(labelled(words)) == ["pairs-anaphor_gender", "documents-texts", "documents-python_stdlib", "choice-é"]
