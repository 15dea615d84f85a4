"""StableHLO: programs run without Aether's code, whatever the rows and the length, and their cache is exact."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.export.reference import stablehlo_model
from aether.export.write import network
from aether.testing import NETWORKS, drawn_state, network_config

SOME = ["aether_plain", "gpt2_dot_yat", "minibert_linear", "bert", "aether_vit", "aether_resnet", "resnet"]
DECODERS = ["aether", "gpt2"]


def check(name, exported, dtype="float32"):
    _, _, wanted, got = exported(name, "stablehlo", dtype)
    assert got.dtype == np.float32 and wanted.std() > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", SOME)
def test_programs_compute_the_same(name, exported):
    check(name, exported)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in SOME + DECODERS])
def test_others_compute_the_same(name, exported):
    check(name, exported)


@pytest.mark.parametrize("name", ["aether_norm", "aether_resnet_head"])
def test_rounded_parameters(name, exported):
    check(name, exported, "bfloat16")


@pytest.mark.parametrize("name", DECODERS)
def test_any_length_and_step_by_step(name, exported):
    """Against Aether's own forward; a prompt, then token by token, is the whole sequence at once."""
    folder, x, wanted, got = exported(name, "stablehlo")
    close = dict(rtol=0, atol=3e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, **close)
    model = stablehlo_model.load(str(folder))
    for rows, length in ((1, 1), (3, 7)):
        np.testing.assert_allclose(model(x[:rows, :length]), wanted[:rows, :length], **close)
    logits, cache = model.decode(x[:2, :5], model.init_cache(2))
    np.testing.assert_allclose(logits, wanted[:2, :5], **close)
    for k in range(5, x.shape[1]):
        assert int(cache["length"]) == k
        logits, cache = model.decode(x[:2, k : k + 1], cache)
        np.testing.assert_allclose(logits[:, 0], wanted[:2, k], **close)


def test_images_in_any_number(exported):
    folder, x, wanted, _ = exported("vit", "stablehlo")
    model = stablehlo_model.load(str(folder))
    for rows in (1, 3):
        np.testing.assert_allclose(model(x[:rows]), wanted[:rows], rtol=0, atol=3e-5 * np.abs(wanted).max())


def test_generation_is_greedy_and_stays_in_the_context(exported):
    folder, x, *_ = exported("gpt2", "stablehlo")
    model = stablehlo_model.load(str(folder))
    config = network_config("gpt2")
    graph, state = drawn_state(config)
    whole = jax.jit(lambda ids: network(config, nnx.merge(graph, state), ids))
    made = model.generate(x[:2, :4], 9)  # the ninth is predicted from the last position of the context
    ids = np.concatenate([x[:2, :4], made], 1)
    np.testing.assert_array_equal(made, np.argmax(whole(jnp.asarray(ids[:, :12])), -1)[:, 3:])
    with pytest.raises(ValueError, match="count is 10; there is room for 9"):
        model.generate(x[:2, :4], 10)
    with pytest.raises(ValueError, match="a row has at most 12"):
        model(np.zeros((1, 13), np.int32))


def test_programs_are_for_several_platforms_and_hold_no_parameters(exported):
    folder, *_ = exported("aether", "stablehlo")
    for file in ("forward.bin", "decode.bin"):
        program = jax.export.deserialize(bytearray((folder / file).read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        small = [line for line in program.mlir_module().splitlines() if "dense<" in line and len(line) > 2000]
        assert not small, "constants as large as parameters are in the program"


def test_nothing_of_aether_is_needed(exported):
    folder, x, wanted, _ = exported("aether_plain", "stablehlo")
    np.save(folder / "x.npy", x)
    code = (
        "import sys, numpy as np; from stablehlo_model import load; network = load('.'); "
        "np.save('y.npy', network(np.load('x.npy'))); "
        "assert not {'aether', 'flax'} & sys.modules.keys(), sys.modules.keys()"
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=clean | {"JAX_PLATFORMS": "cpu"}, check=True)
    np.testing.assert_allclose(np.load(folder / "y.npy"), wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
