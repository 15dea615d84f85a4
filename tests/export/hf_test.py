"""The network in transformers: the same logits, generation with a cache, losses, saving again, the field's harness."""

import json

import numpy as np
import pytest

from aether.evaluate.load import load_run
from aether.export.bundle import parameters_of
from aether.export.hf import load, parameters_from_hf
from aether.export.run import export_run
from aether.testing import IMAGES, NETWORKS, drawn_state, inputs_of, network_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from aether.export.torch import replay, to_tensor  # noqa: E402

transformers.utils.logging.disable_progress_bar()
CAUSAL = ["aether_plain", "gpt2"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(written):
    """Return made(name) -> the model that transformers loads, and inputs for it."""
    return lambda name: (load(written(name, "hf")), to_tensor(inputs_of(network_config(name))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["aether", "aether_plain", "gpt2", "bert", "minibert_linear", "aether_vit", "resnet"])
def test_the_same_as_in_torch(name, dtype, written):
    model, x = load(written(name, "hf", dtype)), inputs_of(network_config(name))
    stored = {p.dtype for key, p in model.state_dict().items() if not key.endswith("whitening")}
    assert stored == {getattr(torch, dtype)} and type(model).__name__.startswith("AetherFor")
    (wanted,) = replay(written(name, "torch", dtype), [x])
    np.testing.assert_array_equal(model.float()(to_tensor(x)).logits.numpy(), wanted)


@pytest.mark.parametrize("name", ["aether_plain", "minibert_linear", "resnet"])
def test_parameters_come_back(name, written):
    config = network_config(name)
    wanted, got = parameters_of(config, drawn_state(config)[1]), parameters_from_hf(written(name, "hf"))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.mark.parametrize("name", CAUSAL)
def test_generates(name, made):
    model, tokens = made(name)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    mask = torch.ones_like(tokens[:, :6])
    mask[0, :3] = 0
    greedy = model.generate(tokens[:, :6], attention_mask=mask, **options)
    assert greedy.shape == (4, 12)
    again = model.generate(tokens[:, :6], attention_mask=mask, use_cache=False, **options)
    assert torch.equal(greedy, again)
    alone = model.generate(tokens[:1, 3:6], attention_mask=mask[:1, 3:], **options)
    assert torch.equal(alone[0, 3:], greedy[0, 6:])
    ids = tokens[1:2, :6]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids[0], greedy[1])
    torch.manual_seed(0)
    drawn = model.generate(
        tokens[:, :6], attention_mask=mask, **options | dict(do_sample=True, top_k=0, temperature=3.0)
    )
    assert drawn.shape == (4, 12) and not torch.equal(drawn, greedy)
    beams = model.generate(tokens[:, :6], attention_mask=mask, num_beams=2, **options)
    assert beams.shape == (4, 12)


def test_losses(made):
    model, tokens = made("gpt2")
    labels = tokens.clone()
    labels[0, :5] = -100
    logits = model(tokens).logits.double().log_softmax(-1)
    terms = -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    wanted = terms[labels[:, 1:] >= 0].mean()
    assert model(tokens, labels=labels).loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert model(tokens, labels=labels, num_items_in_batch=10).loss.item() == pytest.approx(
        terms[labels[:, 1:] >= 0].sum().item() / 10, rel=1e-5
    )
    model, tokens = made("bert")
    labels = torch.full_like(tokens, -100)
    labels[1, 3] = 7
    wanted = -model(tokens).logits[1, 3].log_softmax(-1)[7]
    assert model(tokens, labels=labels).loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    model, images = made("vit")
    wanted = -model(images).logits.log_softmax(-1)[range(4), [0, 1, 2, 3]].mean()
    assert model(images, labels=torch.arange(4)).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_it_refuses(made):
    model, tokens = made("aether_plain")
    with pytest.raises(NotImplementedError, match="keep their vocabulary"):
        model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="dynamic cache"):
        model(tokens, attention_mask=torch.ones(4, 1, 12, 12))


@pytest.mark.parametrize("name", ["aether_plain", "minibert_linear", "aether_vit"])
def test_saved_again(name, made, tmp_path):
    model, x = made(name)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["network"] == model.config.network and facts["aether"]["dtype"] == "float32"
    assert (again.config.id2label == dict(enumerate("abcde"))) == (name in IMAGES)


def test_a_tied_head_is_one_array(made):
    model, _ = made("aether_plain")
    shapes = [tuple(p.shape) for p in model.state_dict().values()]
    assert shapes.count((32, 16)) == 1 and "head" not in NETWORKS["gpt2"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_become_what_the_network_takes(channels, written, tmp_path):
    folder = written("vit", "hf")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.4] * 3
    settings |= dict(image_mean=[0.4] * channels, image_std=[0.3] * channels, do_convert_rgb=channels == 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, channels)).astype(np.uint8)
    got = process(list(pixels), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    wanted = (pixels.astype(np.float32) / 255 - np.float32(0.4)) / np.float32(0.3)
    np.testing.assert_allclose(got, wanted.transpose(0, 3, 1, 2), atol=1e-5)


@pytest.fixture(scope="module")
def exported_run(trained, tmp_path_factory):
    """Return a run of real text and its export, by way of the child process."""
    out = tmp_path_factory.mktemp("hf") / "out"
    parity = export_run(str(trained("aether")), "hf", str(out), log=lambda line: None)
    assert parity.holds and parity.inputs >= 64
    return load_run(str(trained("aether"))), out


def test_a_run_with_its_tokenizer(exported_run):
    run, out = exported_run
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    text = "the model reads a line.\nand  says"
    wanted = run.tokenizer.encode(text).tolist()
    assert tokenizer(text, add_special_tokens=False).input_ids == wanted
    assert tokenizer(text).input_ids == [run.tokenizer.eot, *wanted]
    assert tokenizer.decode(wanted) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == run.tokenizer.eot
    batch = tokenizer(["the model", "a"], padding=True, return_tensors="pt")
    made = load(out).generate(**batch, max_new_tokens=5, do_sample=False)
    assert made.shape[1] == batch.input_ids.shape[1] + 5
    assert "The tokenizer is not" not in (out / "README.md").read_text()


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
"""


def test_the_harness_runs_on_it(written, made, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    lines = [dict(text="a" * n, right="bc", wrong="def") for n in (1, 4, 2)]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tiny.yaml").write_text(TASK.format(path=tmp_path / "tiny.jsonl"))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={written('aether', 'hf')},trust_remote_code=True,dtype=float32",
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    model, _ = made("aether")
    tokenizer = transformers.AutoTokenizer.from_pretrained(written("aether", "hf"), trust_remote_code=True)
    for sample in results["samples"]["tiny"]:
        for choice, (found, _) in zip(("right", "wrong"), sample["filtered_resps"], strict=True):
            text, more = sample["doc"]["text"], " " + sample["doc"][choice]
            ids = tokenizer(text + more, return_tensors="pt").input_ids[0]  # begins with end of text
            logits = model(ids[None]).logits[0, -len(more) - 1 : -1].double().log_softmax(-1)
            wanted = logits.gather(-1, ids[-len(more) :, None]).sum().item()
            assert found == pytest.approx(wanted, rel=1e-5)
