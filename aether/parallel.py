"""The mesh, and the one table that maps logical axes to it."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aether.config import MeshConfig
from aether.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# Logical axis of a parameter -> mesh axis.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "position": None,
    "layers": None,
}


def make_mesh(c: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arrange the devices (all of them by default) along data, fsdp and tensor; -1 takes what is left.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(c, axis) for axis in AXES]
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or 0 in sizes:
        raise InputError(f"The mesh is {named}; every size is at least 1, and only one of them may be -1.")
    fixed = math.prod(size for size in sizes if size > 0)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise InputError(
            f"The mesh is {named} but there are {len(devices)} devices; make the product of the sizes {len(devices)}."
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes]
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: tuple[str | None, ...]) -> P:
    """Return the partition of an array whose axes have these logical names.

    Raises:
      ValueError: an unknown name, or two axes on one mesh axis.
    """
    unknown = [a for a in axes if a is not None and a not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r} in {axes}; RULES has {', '.join(RULES)}.")
    mapped = [None if a is None else RULES[a] for a in axes]
    used = [m for m in mapped if m is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"the axes {axes} use one mesh axis twice: {mapped}.")
    return P(*mapped)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return a tree prefix of `NamedSharding`: by its axes for each `nnx.Variable`, replicated for anything else.

    Works on a whole training state, since optax keeps the variables in its moments.

    Raises:
      InputError: a dimension is not a multiple of the devices along its mesh axis.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nnx.Variable) or not jax.tree.leaves(leaf):  # Muon's state has empty variables
            return NamedSharding(mesh, P())
        partition = spec(leaf.get_metadata()["axes"])
        for size, axis in zip(leaf.shape, partition, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(
                    f"{name} has a dimension of {size}, which mesh.{axis}={mesh.shape[axis]} does not divide; "
                    f"change mesh.{axis}."
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda v: isinstance(v, nnx.Variable))


def placed(shapes: Any, mesh: Mesh) -> Any:
    """Return the shapes of a state, each with the sharding that `shardings` gives it."""

    def place(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), part)

    return jax.tree.map(place, shardings(shapes, mesh), shapes)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise `InputError` unless each microbatch divides over the data and fsdp axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size // accumulate % ways:
        raise InputError(
            f"data.batch_size is {batch_size}, in {accumulate} microbatches, over mesh.data x mesh.fsdp = {ways} "
            f"devices; make it a multiple of {accumulate * ways}."
        )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices, as rows of the global arrays."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
