"""Model FLOPs: counted by hand for both models, and the chips' peaks."""

from types import SimpleNamespace

import pytest
from flax import nnx

from aether.config import Pictures, build
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


def test_images_are_counted_by_their_products():
    """A ResNet of one block a stage at 8 x 8, by hand: each product is places x window x channels x features."""
    model = dict(kind="aether_resnet", stages="1,2", width=8, dtype="float32")
    pictures = Pictures(classes=3, size=8, channels=1, mean=0.5, std=0.5)
    config = build(dict(model=model, data=dict(batch_size=4))).resolved(0, pictures)
    first = 64 * 9 * (1 * 8 + 2 * 8 * 8)  # stem, and both convolutions of the first stage
    second = 16 * (8 * 16 + 9 * 8 * 16 + 9 * 16 * 16)  # skip, and both convolutions of a block that halves the sides
    third = 16 * 9 * 2 * 16 * 16  # a scanned block
    assert flops_per_step(config) == 3 * 4 * 2 * (first + second + third + 16 * 3)
    usual = build(dict(model=model | dict(kind="resnet"), data=dict(batch_size=4))).resolved(0, pictures)
    assert flops_per_step(usual) == flops_per_step(config)


def test_linear_attention_is_counted_linear_in_the_length():
    def flops(context):
        model = dict(
            kind="minibert", attention="yat_linear", layers=1, width=16, heads=2, features=16, vocab_multiple=1
        )
        return flops_per_step(build(dict(model=model, data=dict(context=context, batch_size=1))).resolved(31))

    assert flops(1024) == pytest.approx(2 * flops(512), rel=0.05)


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
