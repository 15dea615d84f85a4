"""To Flax linen: parameters.npz, and the network as modules of the older of Flax's two ways to write them."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from aether.export.npz import write_parameters
from aether.export.source import Source, Target

_NETWORK = Path(__file__).parent / "reference" / "linen_model.py"


def write(source: Source, folder: Path) -> None:
    """Write parameters and network."""
    write_parameters(source, folder)
    shutil.copy(_NETWORK, folder / _NETWORK.name)


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    import jax

    from aether.export.reference import linen_model

    module, variables = linen_model.load(str(folder))
    with jax.default_matmul_precision("highest"):
        network = jax.jit(module.apply)
        yield from (np.asarray(network(variables, x)) for x in batches)


TARGET = Target(
    "Flax linen modules",
    write,
    replay,
    use='from linen_model import load\n\nmodule, variables = load(".")\nlogits = module.apply(variables, inputs)',
    environment={"JAX_PLATFORMS": "cpu"},
)
