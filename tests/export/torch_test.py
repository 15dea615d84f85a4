"""The network in PyTorch: the same logits, going on from a cache, padding that nobody sees."""

import numpy as np
import pytest

from aether.export.run import export_run
from aether.export.torch import parameters_from_torch
from aether.export.bundle import parameters_of
from aether.testing import NETWORKS, TEXTS, drawn_state, network_config

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_computes_the_same(name, dtype, exported):
    _, _, wanted, got = exported(name, "torch", dtype)
    assert got.dtype == np.float32 and wanted.std() > 1e-3
    near(got, wanted)
