"""To Keras 3: network.keras, and the classes that it needs in one file that is meant to be read.

network.keras is Keras' own archive: configuration as JSON, weights as HDF5; loading it unpickles nothing, and runs no
code but that of keras_model.py. bfloat16 parameters are bfloat16 in it; computing is in float32.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aether.export.source import DTYPES, Source, Target

_PARAMETERS = "parameters.npz"


def write(source: Source, folder: Path) -> None:
    """Write the readable file, and the parameters for `finish`."""
    from aether.export.reference import numpy_model

    shutil.copy(Path(numpy_model.__file__).with_name("keras_model.py"), folder)
    arrays: dict[str, Any] = dict(source.parameters)
    np.savez(folder / _PARAMETERS, **arrays)


def finish(folder: Path) -> None:
    """Write network.keras."""
    network, _ = network_of(folder)
    network.save(folder / "network.keras")


def network_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network of what `write` has left, which goes, on the backend of this process; and its facts."""
    from aether.export.reference.keras_model import Network

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with np.load(folder / _PARAMETERS, allow_pickle=False) as file:
        shapes = {name: list(file[name].shape) for name in file.files}
        network = Network(config["network"], shapes, config["aether"]["dtype"])
        for name in file.files:
            value = file[name]  # NumPy reads bfloat16 as two bytes without a name
            network.parameter(name).assign(value if value.dtype == np.float32 else value.view(DTYPES["bfloat16"]))
    (folder / _PARAMETERS).unlink()
    return network, config["network"]


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    from aether.export.reference import keras_model

    network = keras_model.load(str(folder))
    return (network.predict_on_batch(x) for x in batches)


TARGET = Target(
    "a Keras 3 model",
    write,
    replay,
    finish=finish,
    packages=("keras",),
    extra="keras",
    environment={"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
    use="import os\n\n"
    'os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", "tensorflow"\n'
    "from keras_model import load\n\n"
    'network = load(".")\n'
    "logits = network(inputs)",
)
