"""The network in PyTorch: the same logits, going on from a cache, padding that nobody sees."""

import numpy as np
import pytest

from aether.export.bundle import parameters_of
from aether.export.torch import parameters_from_torch, to_tensor
from aether.testing import NETWORKS, TEXTS, drawn_state, inputs_of, network_config

torch = pytest.importorskip("torch")
torch_model = pytest.importorskip("aether.export.reference.torch_model")
CAUSAL = [name for name in TEXTS if NETWORKS[name]["kind"] in ("aether", "gpt2")]
BOTH_WAYS = [name for name in TEXTS if name not in CAUSAL]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.fixture
def made(written):
    """Return made(name, dtype) -> the network in PyTorch, and inputs for it."""

    def load(name, dtype="float32"):
        network = torch_model.load(str(written(name, "torch")), dtype)
        return network, to_tensor(inputs_of(network_config(name)))

    return load


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_computes_the_same(name, exported):
    _, _, wanted, got = exported(name, "torch")
    assert got.dtype == np.float32 and wanted.std() > 1e-3
    near(got, wanted)


@pytest.mark.parametrize("name", ["aether_plain", "minibert_linear", "aether_resnet", "resnet_deep"])
def test_rounded_parameters(name, exported):
    _, _, wanted, got = exported(name, "torch", "bfloat16")
    near(got, wanted)


@pytest.mark.parametrize("name", CAUSAL)
def test_goes_on_from_a_cache(name, made):
    network, tokens = made(name)
    whole, cache = network(tokens), torch_model.Cache()
    parts = [network(tokens[:, start:end], cache=cache) for start, end in ((0, 5), (5, 6), (6, 12))]
    assert cache.get_seq_length() == 12
    near(torch.cat(parts, 1).numpy(), whole.numpy())


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_left(name, made):
    network, tokens = made(name)
    short = network(tokens[:1, 4:])
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    near(network(tokens, mask)[0, 4:].numpy(), short[0].numpy())
    near(network(tokens, mask)[1:].numpy(), network(tokens)[1:].numpy())
    cache = torch_model.Cache()
    parts = [network(tokens[:, :6], mask[:, :6], cache=cache), network(tokens[:, 6:], mask, cache=cache)]
    near(torch.cat(parts, 1)[0, 4:].numpy(), short[0].numpy())


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_padding_on_the_right(name, made):
    network, tokens = made(name)
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    got = network(tokens, mask)
    near(got[0, :8].numpy(), network(tokens[:1, :8])[0].numpy())
    near(got[1:].numpy(), network(tokens)[1:].numpy())


@pytest.mark.parametrize("name", ["aether", "aether_norm", "minibert_linear", "aether_resnet_deep", "resnet", "vit"])
def test_computes_in_other_dtypes(name, made):
    network, x = made(name)
    exact, rough = (made(name, dtype)[0](x) for dtype in ("float64", "bfloat16"))
    assert exact.dtype == torch.float64 and rough.dtype == torch.float32
    near(network(x).numpy(), exact.numpy())
    assert torch.nn.functional.cosine_similarity(rough.double().flatten(), exact.flatten(), 0) > 0.97


@pytest.mark.parametrize("name", ["aether", "minibert_linear", "aether_resnet_deep", "resnet_deep"])
def test_learns(name, made):
    network, x = made(name)
    with torch.enable_grad():
        network.train()(x).square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", ["aether_plain", "minibert_linear", "vit", "aether_resnet_deep", "resnet_deep"])
def test_parameters_come_back(name, written):
    config = network_config(name)
    wanted, got = parameters_of(config, drawn_state(config)[1]), parameters_from_torch(written(name, "torch"))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)
