"""The frameworks that networks are exported to, each in a module of this package that has its name."""

import importlib
import importlib.util
from pathlib import Path

from aether.errors import InputError
from aether.export.source import Parameters, Target

NAMES = ("hf", "torch", "keras", "tf", "linen", "onnx", "stablehlo", "gpt2", "nmn", "npz")


def find(name: str) -> Target:
    """Return a target; nothing of the others is imported, nor JAX for most.

    Raises:
      InputError: there is none of this name.
    """
    if name not in NAMES:
        raise InputError(f"--to is {name!r}; it takes one of {', '.join(NAMES)}.")
    return importlib.import_module(f"aether.export.{name}").TARGET


def require(name: str) -> Target:
    """Return a target whose packages are here.

    Raises:
      InputError: there is none of this name, or its extra is not installed.
    """
    target = find(name)
    missing = [p for p in target.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise InputError(f'--to={name} needs {", ".join(missing)}: pip install -e ".[{target.extra}]"')
    return target


def parameters_in(folder: Path) -> Parameters:
    """Read the parameters of an export to one of the targets that can be read back.

    Raises:
      InputError: there are none, or they cannot be read.
    """
    readable = {name: read for name in NAMES if (read := find(name).read) is not None}
    for read in readable.values():
        if (found := read(folder)) is not None:
            return found
    raise InputError(f"{folder} has no parameters that can be read back; give an export to {', '.join(readable)}.")
