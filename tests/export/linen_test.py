"""Linen: its modules compute what Aether computes, and their own variables are those that they are given."""

import jax
import numpy as np
import pytest

from aether.export.reference import linen_model
from aether.testing import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_linen_computes_the_same(name, exported):
    folder, x, wanted, got = exported(name, "linen")
    assert got.dtype == np.float32 and wanted.std() > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
    module, variables = linen_model.load(str(folder))
    made = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, made)


@pytest.mark.parametrize("name", ["aether", "aether_resnet"])
def test_rounded_parameters(name, exported):
    _, _, wanted, got = exported(name, "linen", "bfloat16")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


def test_names(exported):
    folder, *_ = exported("vit_linear", "linen")
    _, variables = linen_model.load(str(folder))
    assert variables.keys() == {"params", "constants"}
    with np.load(folder / "parameters.npz") as file:
        block = variables["params"]["blocks_1"]
        np.testing.assert_array_equal(block["mlp"]["hidden"]["kernel"], file["blocks.1.mlp.hidden.kernel"])
        whitening = variables["constants"]["blocks_0"]["attention"]["whitening"]
        np.testing.assert_array_equal(whitening, file["blocks.0.attention.whitening"])
