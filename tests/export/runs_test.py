"""Trained runs, exported and compared as a person does it, whatever the target."""

import json

import pytest

from aether.errors import InputError
from aether.export.run import export_run
from aether.export.targets import require

EVERYWHERE = ("hf", "torch", "keras", "linen", "onnx", "stablehlo")
FAMILIES = ("aether", "minibert", "aether_vit", "aether_resnet")
RUNS = [(target, FAMILIES[k % 4]) for k, target in enumerate(EVERYWHERE)]
RUNS += [(target, FAMILIES[(k + 2) % 4]) for k, target in enumerate(EVERYWHERE)] + [("gpt2", "gpt2")]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kind"), RUNS)
def test_a_run(target, kind, trained, tmp_path):
    """Two families to each target; tools/parity.py has them all."""
    try:
        require(target)
    except InputError as e:
        pytest.skip(str(e))
    parity = export_run(str(trained(kind)), target, str(tmp_path / "out"), log=lambda line: None)
    assert parity.holds and parity.inputs >= 64 and 0 <= parity.max_logit_difference < 1e-4
    assert json.loads((tmp_path / "out/parity.json").read_text()) == parity.record()
    if kind in ("aether_vit", "aether_resnet"):
        shape = "(rows, 1, 8, 8)" if target in ("hf", "torch", "onnx") else "(rows, 8, 8, 1)"
        assert f"`inputs` are images {shape}" in (tmp_path / "out/README.md").read_text()
