"""Model FLOPs: counted by hand for both models, and the chips' peaks."""

from types import SimpleNamespace

import pytest
from flax import nnx

from aether.testing import tiny_config, tiny_model
from aether.train.flops import flops_per_step, matrix_parameters, peak_flops

WIDTH, HIDDEN, LAYERS, CONTEXT = 16, 64, 2, 8
BLOCK = 3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * WIDTH * HIDDEN  # query, key, value; output; both halves of the MLP


@pytest.mark.parametrize("kind", ["aether", "gpt2"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_both_models_are_counted_alike(kind, head):
    config = tiny_config(kind, model=dict(head=head))
    params = nnx.state(tiny_model(config))
    matrices = LAYERS * BLOCK + WIDTH * config.model.rows
    assert matrix_parameters(params) == matrices
    assert flops_per_step(config) == (6 * matrices + 12 * LAYERS * WIDTH * CONTEXT) * 8 * CONTEXT


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
    ],
)
def test_peaks_add_up_over_devices(kind, peak):
    assert peak_flops([SimpleNamespace(device_kind=kind)] * 4) == 4 * peak


def test_an_unknown_chip_has_no_peak():
    assert peak_flops([SimpleNamespace(device_kind="cpu")]) is None
