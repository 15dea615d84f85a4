"""nmn: its own layers, on what Aether's layers are given, against those and against the formula."""

import json
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from aether.errors import CheckError, InputError
from aether.export import nmn as target
from aether.export.parity import LayerParity
from aether.export.reference import nmn_layers
from aether.export.run import export_run
from aether.export.write import network
from aether.testing import drawn_state, inputs_of, network_config

pytest.importorskip("nmn", reason="nmn is not installed: pip install -e '.[parity]'")
pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nmn.nnx  # noqa: F401
    import nmn.torch  # noqa: F401

BLOCKS, BOTH = ("blocks.0", "blocks.1"), {"nnx", "torch"}
HIDDEN = {f"{b}.mlp.hidden": BOTH for b in BLOCKS}
# network -> the frameworks that have a layer, and the layers that at least one of them has not
LAYERS = {
    "aether": (HIDDEN, {f"{b}.attention" for b in BLOCKS}),
    "aether_plain": (HIDDEN | {f"{b}.attention": {"nnx"} for b in BLOCKS}, {f"{b}.attention" for b in BLOCKS}),
    "aether_vit": (HIDDEN | {"head": BOTH}, {f"{b}.attention" for b in BLOCKS}),
    "aether_resnet": ({f"stages.{at}.hidden": BOTH for at in ("0.0", "1.0", "1.1")}, set()),
}


def parity_of(source, folder, x):
    pairs = list(target.ours(source, [x]))
    with jax.enable_x64(True):
        theirs = list(target.replay(folder, [given for given, _ in pairs]))
    assert all(y.std() > 1e-3 for y in theirs), [(y.dtype, y.std()) for y in theirs]
    return target.compare(folder, [(ours, y) for (_, ours), y in zip(pairs, theirs, strict=True)])


@pytest.mark.parametrize("name", LAYERS)
def test_nmn_computes_the_same(name, source_of, tmp_path):
    source = source_of(name)
    target.write(source, tmp_path)
    parity = parity_of(source, tmp_path, inputs_of(network_config(name)))
    compared, left_out = LAYERS[name]
    assert {layer: set(found) for layer, found in parity.differences.items()} == compared
    assert parity.left_out.keys() == left_out and all(parity.left_out.values())
    assert parity.holds, parity.record()
    assert parity.largest("aether") > 0


def test_a_changed_state_is_noticed(source_of, tmp_path):
    source = source_of("aether_resnet")
    target.write(source, tmp_path)
    with np.load(tmp_path / "torch.npz") as file:
        arrays = dict(file)
    arrays["stages.1.1.hidden/0/alpha"] *= np.float32(1 + 1e-5)
    np.savez(tmp_path / "torch.npz", **arrays)
    parity = parity_of(source, tmp_path, inputs_of(network_config("aether_resnet")))
    assert not parity.holds and parity.largest("formula") == pytest.approx(1e-5, rel=0.1)
    assert parity.differences["stages.1.1.hidden"]["nnx"]["formula"] < 1e-6
    assert "1.0e-05 (formula, of 1e-06 allowed)" in parity.verdict("nmn")


def test_layers_are_seen_in_the_network(source_of):
    """The head's output is the network's."""
    config = network_config("aether_vit")
    x = inputs_of(config)
    graph, state = drawn_state(config)
    seen = target.seen_layers(source_of("aether_vit"), x)
    wanted = jax.jit(lambda state, x: network(config, nnx.merge(graph, state), x))(state, x)
    assert list(seen) == [f"{b}.{part}" for b in BLOCKS for part in ("attention", "mlp.hidden")] + ["head"]
    np.testing.assert_allclose(seen["head"].y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt2", "no ⵟ layer that nmn has .none at all"),
        ("aether_resnet_deep", "stages.0.0.hidden: nmn's convolutions do not compare directions"),
    ],
)
def test_a_network_without_such_layers_is_refused(name, said, source_of, tmp_path):
    with pytest.raises(InputError, match=said):
        target.write(source_of(name), tmp_path)


def test_numbers_that_are_not_finite_do_not_hold():
    parity = LayerParity(64, {"head": {"nnx": dict(formula=float("nan"), aether=0.0)}}, {})
    assert not parity.holds and parity.record()["max_formula_difference"] is None
    json.dumps(parity.record(), allow_nan=False)


@pytest.mark.slow
def test_a_trained_run(trained, tmp_path, monkeypatch):
    out, run = tmp_path / "out", str(trained("aether"))
    parity = export_run(run, "nmn", str(out), log=lambda line: None)
    record = json.loads((out / "parity.json").read_text())
    assert parity.holds and record["verified"] and record["max_formula_difference"] <= 1e-6
    assert set(record["left_out"]) == {f"{b}.attention" for b in BLOCKS}
    card = (out / "README.md").read_text()
    assert "| blocks.0.attention, nnx | not compared | nmn's attention has no b in its scores |" in card
    layer = nmn_layers.load(str(out), "torch")["blocks.1.mlp.hidden"]
    assert layer(np.ones((3, 16))).shape == (3, 64)
    monkeypatch.setattr(LayerParity, "holds", False)
    with pytest.raises(CheckError, match="The layers of the nmn export are not those that Aether has"):
        export_run(run, "nmn", str(tmp_path / "bad"), log=lambda line: None)
    assert (tmp_path / "bad" / "UNVERIFIED").exists()
