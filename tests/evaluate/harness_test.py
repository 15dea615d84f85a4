"""lm-evaluation-harness with a run as its model: its scores of local tasks are exactly those of our own tasks."""

import json
import sys
import types
import warnings

import jax
import numpy as np
import pytest

from aether.data.tokenizers import Bytes
from aether.errors import InputError
from aether.evaluate import harness as module
from aether.evaluate import load
from aether.evaluate.harness import cut, read_settings
from aether.evaluate.requests import pair, rolling
from aether.evaluate.tasks.run import evaluate_tasks
from aether.generate.decode import Decoder
from aether.generate.text import text_stream
from aether.parallel import make_mesh

WORDS = "the model reads a line and says größer what ⵟ comes next if it can".split()
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list: [{metrics}]
"""
# Ours: what the harness is told about the same lines, and what it calls what we report.
TASKS = dict(
    lambada=(
        "loglikelihood", "{{context}}", "{{' ' + continuation}}", "", dict(perplexity="perplexity", acc="accuracy")
    ),
    choice=(
        "multiple_choice", "{{query}}", "gold", "doc_to_choice: choices", dict(acc="accuracy", acc_norm="accuracy_norm")
    ),
    pairs=(
        "multiple_choice", "", "0", 'doc_to_choice: "{{[sentence_good, sentence_bad]}}"', dict(acc="accuracy")
    ),
    documents=(
        "loglikelihood_rolling", "", "{{text}}", "",
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def lm_eval():
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        made = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    return made


@pytest.fixture(scope="module")
def model(lm_eval, bytes_run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.AetherLM(bytes_run)


def some(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("files")
    lines = dict(
        lambada=[dict(context=some(rng, 0, 12) + end, continuation=some(rng, 1, 3)) for end in (" ", "", "\n") * 5],
        choice=[
            dict(query=some(rng, 0, 9), choices=[some(rng, 1, 4) for _ in range(count)], gold=int(rng.integers(count)))
            for count in rng.integers(2, 5, 25)
        ],
        pairs=[dict(sentence_good=some(rng, 2, 6), sentence_bad=some(rng, 2, 6)) for _ in range(15)],
        documents=[dict(text=some(rng, 1, 40) + end) for end in ("", " ", "\n\n") * 3],
    )
    for name, found in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    for name, (kind, text, target, more, metrics) in TASKS.items():
        listed = ", ".join(f"{{metric: {metric}}}" for metric in metrics)
        words = dict(name=f"my_{name}", file=folder / f"{name}.jsonl", cache=folder / "cache", kind=kind)
        (folder / f"{name}.yaml").write_text(YAML.format(**words, text=text, target=target, more=more, metrics=listed))
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_exactly_the_harness_s(lm_eval, model, files, bytes_run, name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = lm_eval.tasks.TaskManager(include_path=str(files), include_defaults=False)
        # Of a perplexity the harness finds the standard error by drawing samples, in processes: left out.
        drawn = 0 if name == "lambada" else 1
        found = lm_eval.simple_evaluate(model=model, tasks=[f"my_{name}"], task_manager=manager, bootstrap_iters=drawn)
    theirs = found["results"][f"my_{name}"]
    ours = evaluate_tasks(bytes_run, [f"{name}:{files / name}.jsonl"])["tasks"][f"{name}-{name}"]
    for metric, own in TASKS[name][-1].items():
        assert theirs[f"{metric},none"] == ours[own], metric
        if drawn and metric.startswith("acc"):
            assert theirs[f"{metric}_stderr,none"] == ours[f"{own}_stderr"] > 0, metric


def test_requests_are_divided_as_the_harness_does(lm_eval):
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Divider(TemplateLM):
        eot_token_id = 256
        generate_until = loglikelihood_rolling = None

        def tok_encode(self, string, **_):
            return Bytes().encode(string).tolist()

        def _loglikelihood_tokens(self, requests, **_):
            return [(before, asked) for _, before, asked in requests]

    rng, length = np.random.default_rng(2), 40
    texts = [(some(rng, 0, 9) + end, " " + some(rng, 1, 3)) for end in ("", " ", " \n") * 20]
    divided = Divider().loglikelihood([types.SimpleNamespace(args=t) for t in texts], disable_tqdm=True)
    assert any(t[0] == "" for t in texts) and len(divided) == 60
    for (context, asked), text in zip(divided, texts, strict=True):
        request = pair(Bytes(), *text, length)
        context = context or [256]  # white space alone: the harness's own models fail there
        assert request.ids.tolist() == (context + asked)[-(length + 1) :] and request.scored == len(asked)
    for count in range(0, 130):
        ids = rng.integers(0, 256, count).astype(np.int32)
        theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids.tolist(), 256, length, 1)]
        ours = list(rolling(ids, 256, length))
        assert [(w.ids.tolist(), w.scored) for w in ours] == [(a + b, len(b)) for a, b in theirs]


def asked(context, **settings):
    return types.SimpleNamespace(args=(context, settings))


def test_text_is_generated_up_to_what_ends_it(lm_eval, bytes_run, monkeypatch):
    monkeypatch.setattr(load, "mesh_of", lambda c: make_mesh(c, jax.devices()[:1]))
    model = module.AetherLM(bytes_run)
    loaded = model.run
    decoder = Decoder(loaded.graph, 32, 256, 257)
    settings = dict(temperature=0.0)
    whole = "".join(text_stream(decoder, loaded.params, loaded.tokenizer, "the model", 12, **settings))
    stop = whole[4:6]
    found = model.generate_until(
        [
            asked("the model", max_gen_toks=12),
            asked("the model", max_gen_toks=12, until=["never there", stop], do_sample=False, temperature=1.0),
            asked("the model", max_new_tokens=3, until=""),
            asked("the model", max_gen_toks=12, do_sample=True, temperature=2.0),
            asked("the model reads a line and says what comes next " * 9, max_gen_toks=8),
        ]
    )
    assert found[0] == whole and found[1] == whole[: whole.index(stop)]
    assert whole.startswith(found[2].rstrip("\ufffd")) and 0 < len(found[2]) <= 3
    assert found[3] != whole
    kept = ("the model reads a line and says what comes next " * 9)[-(32 - 8 - 1) :]
    assert found[4] == "".join(text_stream(decoder, loaded.params, loaded.tokenizer, kept, 8, **settings))


def test_settings_of_a_task():
    assert read_settings({}) == ([], 256, dict(temperature=0.0, top_k=0, top_p=1.0))
    warm = dict(until="\n", max_gen_toks=5, temperature=0.7, top_k=3, top_p=0.5)
    assert read_settings(warm) == (["\n"], 5, dict(temperature=0.7, top_k=3, top_p=0.5))
    assert read_settings(warm | dict(do_sample=False))[2]["temperature"] == 0.0
    assert read_settings(dict(do_sample=True))[2]["temperature"] == 1.0
    with pytest.raises(InputError, match="generate with num_beams, penalty, which a run does not have; it has until"):
        read_settings(dict(num_beams=3, penalty=1))


def test_no_more_is_read_than_is_used():
    pieces = iter(["ab", "c\n", "d", "e"])
    assert cut(pieces, ["\n", "never"]) == "abc" and next(pieces) == "d"
    assert cut(iter(["ab", "cd"]), ["bc", "d"]) == "a" and cut(iter(["ab"]), []) == "ab"


def test_the_harness_finds_the_model_by_name(lm_eval, model):
    from lm_eval.api.registry import get_model

    assert get_model("aether") is module.AetherLM and isinstance(model, module.AetherLM)
    assert issubclass(module.AetherLM, lm_eval.api.model.LM)


def test_what_cannot_be_asked(model, write_bytes_run, tmp_path):
    with pytest.raises(InputError, match="Request 1 of the harness: 'x{39}…' is 50 tokens long"):
        model.loglikelihood([types.SimpleNamespace(args=("a", end)) for end in (" b", "x" * 50)])
    folder = write_bytes_run(tmp_path / "bert", model=dict(kind="bert"))
    with pytest.raises(InputError, match="The harness takes a language model, .* is a run of bert"):
        module.AetherLM(folder)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    module._model_class.cache_clear()
    try:
        with pytest.raises(InputError, match=r"pip install -e '.\[harness\]'"):
            getattr(module, "AetherLM")  # noqa: B009
    finally:
        module._model_class.cache_clear()
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        getattr(module, "Other")  # noqa: B009
