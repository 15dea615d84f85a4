"""GPT-2's own layout: what transformers computes from it, and what Aether computes from what transformers wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import build
from aether.errors import InputError
from aether.export.bundle import facts_of, parameters_of, state_of
from aether.export.gpt2 import parameters_from_gpt2, write
from aether.export.source import Source
from aether.export.write import network
from aether.models import describe_model
from aether.testing import VOCAB, drawn_state, network_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_same(dtype, exported):
    folder, _, wanted, got = exported("gpt2", "gpt2", dtype)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())


def test_there_and_back(written):
    config = network_config("gpt2")
    facts, got = parameters_from_gpt2(written("gpt2", "gpt2"))
    known = facts_of(config)
    assert facts.items() <= known.items() and known.keys() - facts.keys() == {"spherical", "rope_theta", "unit_bias"}
    wanted = parameters_of(config, drawn_state(config)[1])
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Return a GPT-2 that transformers made, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, n_positions=12, n_embd=16, n_layer=2, n_head=4)
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=31, eos_token_id=31)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and scales that are not 1
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, folder


def test_aether_computes_what_transformers_made(theirs):
    model, folder = theirs
    facts, parameters = parameters_from_gpt2(folder)
    sizes = {key: facts[key] for key in ("layers", "heads", "width", "hidden", "head", "position")}
    config = build(dict(model=dict(kind="gpt2", dtype="float32", **sizes), data=dict(context=facts["context"])))
    config = config.resolved(facts["vocab"])
    graph, *shapes = describe_model(config)
    state = state_of(config, nnx.merge_state(*shapes), parameters)
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 12))
    got = jax.jit(lambda s, x: network(config, nnx.merge(graph, s), x))(jax.tree.map(jnp.asarray, state), ids)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


def test_scaled_embeddings_are_refused(tmp_path):
    config = network_config("gpt2")
    parameters, facts = parameters_of(config, drawn_state(config)[1]), facts_of(config) | dict(embed_scale=2.5)
    with pytest.raises(InputError, match="scale of embeddings, 2.5, .* use --to=hf"):
        write(Source(facts, parameters, "float32", None, None, {}), tmp_path)


def _changed(folder, to, **config):
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    content = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(activation_function="relu"), "activation_function='relu'"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(n_layer=3), "no array h.2.attn.c_attn.weight"),
        (dict(n_layer=1), "has an array h.1."),
    ],
)
def test_what_is_not_gpt2_is_refused(theirs, tmp_path, config, said):
    with pytest.raises(InputError, match=said):
        parameters_from_gpt2(_changed(theirs[1], tmp_path, **config))


def test_files_that_are_missing(theirs, tmp_path):
    with pytest.raises(InputError, match="config.json cannot be read"):
        parameters_from_gpt2(tmp_path)
    (_changed(theirs[1], tmp_path) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is not there"):
        parameters_from_gpt2(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("aether", "attention=yat"), ("gpt2_dot_yat", "mlp=yat"), ("bert", "head=untied"), ("vit", "head=")],
)
def test_networks_of_other_parts_are_refused(name, said, written):
    with pytest.raises(InputError, match=said):
        written(name, "gpt2")
