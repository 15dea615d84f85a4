"""To PyTorch: model.safetensors, and the network in one file that is meant to be read.

Names are those of `aether.export.bundle` with PyTorch's last parts and its layouts: linear maps (out, in), convolutions
(out, in, k, k).
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from aether.errors import InputError
from aether.export.source import Parameters, Source, Target
from aether.export.tensors import read_tensors, write_tensors

WEIGHTS = "model.safetensors"
_LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TABLES = ("embed", "position", "token")


def to_torch(parameters: Parameters, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the entries of a `state_dict`; views."""
    for name, a in parameters.items():
        module, _, last = name.rpartition(".")
        order = {2: (1, 0), 4: (3, 2, 0, 1)}[a.ndim] if last == "kernel" else range(a.ndim)
        yield f"{prefix}{module}.{_LAST.get(last, last)}", a.transpose(order)


def from_torch(state: Mapping[str, np.ndarray], prefix: str = "") -> Parameters:
    """Return the parameters, by our names, of a `state_dict` of `to_torch`; views.

    Raises:
      InputError: a name has not the prefix.
    """
    found: Parameters = {}
    for name, a in state.items():
        if not name.startswith(prefix):
            raise InputError(f"The export has an array {name}; names must begin with {prefix}.")
        module, _, last = name.removeprefix(prefix).rpartition(".")
        if last == "weight":
            last = "embedding" if module in _TABLES else "kernel" if a.ndim > 1 else "scale"
        order = {2: (1, 0), 4: (2, 3, 1, 0)}[a.ndim] if last == "kernel" else range(a.ndim)
        back = {"running_mean": "mean", "running_var": "var"}
        found[f"{module}.{back.get(last, last)}"] = a.transpose(order)
    return found


def parameters_from_torch(folder: Path) -> Parameters:
    """Return the parameters of an export to `torch`, mapped from its file."""
    return from_torch(read_tensors(folder / WEIGHTS))


def read(folder: Path) -> Parameters | None:
    """Return the parameters of an export to `torch`; None of another folder."""
    return parameters_from_torch(folder) if (folder / "torch_model.py").exists() else None


def write(source: Source, folder: Path) -> None:
    """Write model.safetensors and torch_model.py."""
    write_tensors(folder / WEIGHTS, to_torch(source.parameters))
    shutil.copy(Path(__file__).parent / "reference" / "torch_model.py", folder)


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    import torch

    from aether.export.reference import torch_model

    network = torch_model.load(str(folder))
    with torch.inference_mode():
        for x in batches:
            yield network(to_tensor(x)).numpy()


def to_tensor(x: np.ndarray):
    """Return ids as int64, or images as (b, c, h, w)."""
    import torch

    return torch.from_numpy(x).long() if x.ndim == 2 else torch.from_numpy(x).permute(0, 3, 1, 2)


TARGET = Target(
    "model.safetensors and the network in PyTorch",
    write,
    replay,
    use='from torch_model import load\n\nnetwork = load(".")\nlogits = network(inputs)',
    packages=("torch", "safetensors"),
    extra="torch",
    channels_first=True,
    read=read,
)
