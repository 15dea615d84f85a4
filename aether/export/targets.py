"""The frameworks that networks are exported to."""

import importlib.util

from aether.errors import InputError
from aether.export import linen, nmn, npz, stablehlo
from aether.export.source import Target

TARGETS: dict[str, Target] = {
    "linen": linen.TARGET,
    "nmn": nmn.TARGET,
    "npz": npz.TARGET,
    "stablehlo": stablehlo.TARGET,
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
