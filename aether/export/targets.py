"""The frameworks that networks are exported to."""

import importlib.util
from pathlib import Path

from aether.errors import InputError
from aether.export import gpt2, hf, keras, linen, nmn, npz, onnx, stablehlo, tf, torch
from aether.export.bundle import Parameters
from aether.export.source import Target

TARGETS: dict[str, Target] = {
    "hf": hf.TARGET,
    "torch": torch.TARGET,
    "keras": keras.TARGET,
    "tf": tf.TARGET,
    "linen": linen.TARGET,
    "onnx": onnx.TARGET,
    "stablehlo": stablehlo.TARGET,
    "gpt2": gpt2.TARGET,
    "nmn": nmn.TARGET,
    "npz": npz.TARGET,
}


def target_of(name: str) -> Target:
    """Return a target whose packages are here.

    Raises:
      InputError: there is none of this name, or its extra is not installed.
    """
    if name not in TARGETS:
        raise InputError(f"--to is {name!r}; it takes one of {', '.join(TARGETS)}.")
    target = TARGETS[name]
    missing = [p for p in target.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise InputError(f'--to={name} needs {", ".join(missing)}: pip install -e ".[{target.extra}]"')
    return target


def parameters_in(folder: Path) -> Parameters:
    """Read the parameters of an export to one of the targets that can be read back.

    Raises:
      InputError: there are none, or they cannot be read.
    """
    for target in TARGETS.values():
        if target.read is not None and (found := target.read(folder)) is not None:
            return found
    readable = ", ".join(name for name, target in TARGETS.items() if target.read is not None)
    raise InputError(f"{folder} has no parameters that can be read back; give an export to {readable}.")
