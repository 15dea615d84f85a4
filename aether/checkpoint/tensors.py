"""The arrays of a checkpoint, as Orbax writes and reads them."""

import asyncio
import logging
import os
from typing import Any

import jax
import numpy as np

from aether import arrays

METADATA = "array_metadatas"  # Orbax's name for the folder in which each process describes what it writes


def start(folder: Any, leaves: dict[str, Any]) -> list[Any]:
    """Begin to write named arrays into a folder, which is made, and return futures.

    What is on an accelerator is copied to the host before this returns. All processes call it, each writes its part;
    then one of them calls `finish`.
    """
    import orbax.checkpoint as ocp

    _silence_orbax()
    # Made by all: Orbax would have the others wait, ten minutes if process 0 fails, until that one has made it.
    (folder / METADATA).mkdir(parents=True, exist_ok=True)
    return asyncio.run(ocp.PyTreeCheckpointHandler().async_save(folder, args=ocp.args.PyTreeSave(leaves))) or []


def finish(folder: Any) -> None:
    """Join what the processes wrote."""
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointHandler().finalize(folder)


def described(folder: Any) -> dict[str, tuple[list[int], str]]:
    """Return {name: (shape, dtype)}, as the files say."""
    import orbax.checkpoint as ocp

    _silence_orbax()
    tree: Any = ocp.PyTreeCheckpointHandler().metadata(folder)
    return {name: (list(entry.shape), str(np.dtype(entry.dtype))) for name, entry in tree.tree.items()}


def read(folder: Any, saved: dict[str, Any], wanted: dict[str, Any]) -> list[Any]:
    """Read the wanted arrays, and nothing else, in the order of `wanted`.

    Args:
      folder: what `start` wrote to.
      saved: name -> {"key": the name on disk}.
      wanted: name -> array, shape with sharding, or scalar, whose likes are returned.
    """
    import orbax.checkpoint as ocp

    _silence_orbax()
    keys = {name: saved[name]["key"] for name in wanted}
    targets = {keys[name]: arrays.target_of(leaf) for name, leaf in wanted.items()}
    how = {
        key: ocp.RestoreArgs(restore_type=np.ndarray, dtype=t.dtype)
        if isinstance(t, np.ndarray)
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=t.dtype, global_shape=t.shape, sharding=t.sharding)
        for key, t in targets.items()
    }
    args = ocp.args.PyTreeRestore(item=targets, restore_args=how, partial_restore=True)
    values = ocp.PyTreeCheckpointHandler().restore(folder, args=args)
    scalars = (bool, int, float)
    return [
        type(leaf)(values[keys[name]]) if isinstance(leaf, scalars) else values[keys[name]]
        for name, leaf in wanted.items()
    ]


def _silence_orbax() -> None:
    """Keep Orbax's running commentary out of the log; what fails there is raised as well."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
