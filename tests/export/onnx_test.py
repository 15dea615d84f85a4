"""ONNX: what onnxruntime computes, for other numbers of rows and other lengths than were traced."""

import numpy as np
import pytest

from aether.export.onnx import replay
from aether.testing import TEXTS, inputs_of, network_config

for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
from aether.export import torch as in_torch  # noqa: E402

NAMES = ["aether", "minibert_linear", "bert", "aether_vit", "aether_resnet_deep", "resnet"]


# PyTorch's tracer copies a class of its own that it has deprecated.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_onnx_computes_the_same(name, written):
    x = inputs_of(network_config(name), rows=5)
    batches = [x, x[:1], x[:2]] + ([x[:3, :7], x[:1, :1]] if name in TEXTS else [])
    onnx, torch = (list(run(written(name, to), batches)) for run, to in ((replay, "onnx"), (in_torch.replay, "torch")))
    for got, wanted in zip(onnx, torch, strict=True):
        assert got.dtype == np.float32 and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
