"""Networks as SavedModels, made and run in processes of their own: TensorFlow does not belong into one with JAX."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from aether.export.run import export_run
from aether.export.targets import find
from aether.testing import NETWORKS, TEXTS, inputs_of, network_config

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, find("tf").packages)),
    reason="TensorFlow is not installed: pip install -e '.[tf]'",
)
FEW = {name: "float32" for name in ("gpt2", "aether", "aether_vit", "aether_resnet_deep", "resnet")}
FEW["minibert_linear"] = "bfloat16"
REST = {name: "float32" for name in NETWORKS if FEW.get(name) != "float32"}
SCRIPT = """
import sys
from pathlib import Path
from aether.export import source, tf
for folder in sys.argv[1:]:
    work = Path(folder + "-work")
    tf.TARGET.finish(Path(folder))
    source.save_logits(work, tf.TARGET.replay(Path(folder), source.load_inputs(work)))
"""


@pytest.fixture
def saved(written, aether, tmp_path):
    """Return saved({name: dtype}): for each name and batch, the shape, Aether's logits and those of the SavedModel."""

    def save(names):
        wanted = {}
        for name, dtype in names.items():
            work, x = tmp_path / f"{name}-work", inputs_of(network_config(name))
            work.mkdir()
            shutil.copytree(written(name, "tf", dtype), tmp_path / name)
            batches = [x, x[:1], *((x[:3, :7], x[:2, :1]) if name in TEXTS else ())]
            for k, batch in enumerate(batches):
                np.save(work / f"inputs-{k:03}.npy", batch)
                wanted[name, k] = aether(name, dtype)(batch)
        command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in names)]
        environment = os.environ | find("tf").environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [
            ((name, *ours.shape), ours, np.load(tmp_path / f"{name}-work/theirs-{k:03}.npy"))
            for (name, k), ours in wanted.items()
        ]

    return save


@pytest.mark.parametrize("names", [FEW, pytest.param(REST, marks=pytest.mark.slow)], ids=["few", "rest"])
def test_the_same_logits_at_any_batch_and_length(names, saved):
    for case, wanted, got in saved(names):
        assert wanted.std() > 1e-3
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max(), err_msg=str(case))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "aether", "bert", "aether_vit", "aether_resnet"])
def test_a_run(kind, trained, tmp_path):
    parity = export_run(str(trained(kind)), "tf", str(tmp_path / "out"), log=lambda line: None)
    assert parity.holds and parity.inputs == 64
    assert (tmp_path / "out/saved_model/saved_model.pb").exists() and not (tmp_path / "out/parameters.npz").exists()
    assert "tensorflow" not in sys.modules
