"""To NumPy: parameters.npz, and the network in one file that is meant to be read."""

import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aether.errors import InputError
from aether.export.reference import numpy_model
from aether.export.source import Parameters, Source, Target


def write(source: Source, folder: Path) -> None:
    """Write parameters and network."""
    write_parameters(source, folder)
    shutil.copy(numpy_model.__file__, folder / "numpy_model.py")


def write_parameters(source: Source, folder: Path) -> None:
    """Write parameters.npz; bfloat16, for which NumPy has no name, as the upper halves of float32 numbers, uint16."""
    plain: dict[str, Any] = {k: v if v.dtype == np.float32 else v.view(np.uint16) for k, v in source.parameters.items()}
    np.savez(folder / "parameters.npz", **plain)


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    network = numpy_model.load(str(folder))
    return (network(x) for x in batches)


def read(folder: Path) -> Parameters | None:
    """Read parameters.npz, if there is one."""
    file = folder / "parameters.npz"
    if not file.exists():
        return None
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as found:
            return {name: numpy_model.wide(found[name]) for name in found.files}
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise InputError(f"{file} is damaged ({e}); copy it again.") from e


TARGET = Target(
    "parameters.npz and the network in NumPy",
    write,
    replay,
    read=read,
    use='from numpy_model import load\n\nnetwork = load(".")\nlogits = network(inputs)',
)
