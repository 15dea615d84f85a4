"""Networks in Keras: all of them on JAX in this process, some on PyTorch."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from aether.errors import InputError
from aether.export.targets import find, require
from aether.testing import NETWORKS, inputs_of, network_config

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
ON_TORCH = ["gpt2", "minibert_linear", "aether_vit", "aether_resnet_deep", "resnet_deep"]


@pytest.fixture(scope="module", autouse=True)
def keras():
    """Keras on JAX, which it stays in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setitem(sys.modules, "tensorflow", None)  # Keras imports it just to see whether a thing is of its types
        keras = pytest.importorskip("keras", reason="Keras is not installed: pip install -e '.[keras]'")
        assert keras.backend.backend() == "jax"
        yield keras


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits(name, exported):
    folder, _, wanted, got = exported(name, "keras")
    assert wanted.std() > 1e-3 and not (folder / "parameters.npz").exists()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "keras_model.py", "network.keras"} < names | {""} and "parameters.npz" not in names


@pytest.mark.parametrize("name", ["minibert_linear", "resnet"])
def test_rounded_parameters(name, exported, keras):
    folder, x, wanted, got = exported(name, "keras", "bfloat16")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
    network = keras.saving.load_model(folder / "network.keras")
    dtypes = {weight.path.rpartition("/")[2]: weight.dtype for weight in network.weights}
    assert dtypes.pop("whitening", "float32") == "float32"
    assert set(dtypes.values()) == {"bfloat16"}


def test_the_model_is_called_and_saved_like_any_other(exported, keras, tmp_path):
    folder, x, wanted, _ = exported("gpt2", "keras")
    network = keras.saving.load_model(folder / "network.keras")
    assert isinstance(network, keras.Model) and network.count_params() == sum(w.value.size for w in network.weights)
    network.parameter("norm.bias").assign(np.ones(16, np.float32))
    network.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")(x[:, :5])
    np.testing.assert_array_equal(again, network(x[:, :5]))
    assert np.abs(again - wanted[:, :5]).max() > 0.1


@pytest.mark.slow
def test_on_pytorch_by_the_lines_of_the_card(written, aether, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[torch]'")
    wanted = {}
    for name in ON_TORCH:
        folder, x = shutil.copytree(written(name, "keras"), tmp_path / name), inputs_of(network_config(name))
        find("keras").finish(folder)
        np.save(folder / "inputs.npy", x)
        wanted[name] = aether(name)(x)
    lines = "\n".join(f"    {line}" for line in find("keras").use.splitlines())
    script = (
        "import os, sys, numpy\nsys.path.insert(0, '.')\nroot = os.getcwd()\nfor name in sys.argv[1:]:\n"
        f"    os.chdir(os.path.join(root, name))\n    inputs = numpy.load('inputs.npy')\n{lines}\n"
        "    numpy.save('logits.npy', logits.detach().numpy())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", script, *ON_TORCH]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ON_TORCH:
        got = np.load(tmp_path / name / "logits.npy")
        np.testing.assert_allclose(got, wanted[name], rtol=0, atol=3e-5 * np.abs(wanted[name]).max(), err_msg=name)


@pytest.mark.parametrize("target", ["keras", "tf"])
def test_a_missing_package_is_named_with_its_extra(target, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf'--to={target} needs .*keras: pip install -e "\.\[{target}\]"'):
        require(target)
