"""A state as named arrays: names, copies, and whether saved ones are those wanted."""

from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from aether.errors import InputError


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return {"opt_state/0/mu/kernel": leaf, ...}, in the order of the tree's leaves.

    Raises:
      ValueError: two leaves have one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if path[-1:] == (GetAttrKey("value"),):  # what an nnx.Variable holds
            path = path[:-1]
        name = keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"Two leaves of the state have the name {name!r}; rename one of them.")
        named[name] = leaf
    return named


def owned(leaf: Any) -> Any:
    """Return an array that donating or changing `leaf` does not touch.

    On accelerators Orbax copies to the host before a save returns. On a CPU it reads the same memory, and the next
    donated step would wait for the writer; of the ways to copy, JAX's own costs least, since it goes on while the call
    returns (`tools/bench.py --what=save`; LOG.md).
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if on_host(leaf) else leaf


def on_host(leaf: Any) -> bool:
    """Say whether a leaf is in the memory that this process's CPU works on."""
    if not isinstance(leaf, jax.Array):
        return True
    devices: set[Any] = leaf.devices()
    return next(iter(devices)).platform == "cpu"


def target_of(leaf: Any) -> Any:
    """Return what to read a leaf as: a NumPy array, or a device array with a sharding."""
    if isinstance(leaf, (np.ndarray, np.generic, bool, int, float)):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check(saved: dict[str, Any], wanted: dict[str, Any], scope: str | tuple[str, ...], where: str) -> None:
    """Raise `InputError` at the first array whose name, shape or dtype is not the one wanted."""
    for name, leaf in wanted.items():
        target = target_of(leaf)
        want = f"{target.dtype}{list(target.shape)}"
        if name not in saved:
            raise InputError(f"{where} has no array {name}, which is {want} here; use the config it was made with.")
        have = f"{saved[name]['dtype']}{saved[name]['shape']}"
        if have != want:
            raise InputError(f"{where} has {name} as {have}, but here it is {want}; use the config it was made with.")
    for name in saved:
        if name.startswith(scope) and name not in wanted:
            raise InputError(f"{where} has an array {name}, which is not here; use the config it was made with.")
