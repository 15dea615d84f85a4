"""The mesh, the one table that maps logical axes to it, and what the models say about where arrays lie.

A mesh has the axes `data`, `fsdp`, `sequence` and `tensor`. Each has a part within a slice, whose chips are neighbours
(ICI), and a part across slices (DCN), which is its outer one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aether.config import Config, MeshConfig
from aether.errors import InputError
from aether.kernels.flash import unsupported
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.scores import DotScore

AXES = ("data", "fsdp", "sequence", "tensor")  # outermost first: tensor talks most, so its devices are the nearest
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
BATCH = P(ROWS)
# Logical axis of a parameter -> mesh axes; `mesh.rules` overrides it.
RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "position": (),
    "layers": (),
}


def make_mesh(c: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices (all of them by default) along the four axes; -1 takes what is left.

    Slices are those that the devices report. Devices that report none, CPUs and GPUs, are cut into as many equal groups
    as `mesh.dcn_*` asks for, in the order of their processes.

    Raises:
      InputError: the sizes do not multiply to the number of devices of a slice, or of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    groups = _slices(c, devices)
    dcn = _fill(c, "dcn_", len(groups), "slices" if len(groups) > 1 or devices[0].platform == "tpu" else "slice")
    ici = _fill(c, "", len(groups[0]), "devices" if len(groups) == 1 else "devices in each slice")
    arranged = np.stack([_arrange(ici, group) for group in groups]).reshape(*dcn, *ici)
    n = len(AXES)
    arranged = arranged.transpose([k + n * part for k in range(n) for part in (0, 1)])
    shape = [a * b for a, b in zip(dcn, ici, strict=True)]
    return Mesh(arranged.reshape(shape), AXES, axis_types=(AxisType.Auto,) * n)


def _slices(c: MeshConfig, devices: Sequence[Any]) -> list[list[Any]]:
    """Return the devices of each slice."""
    numbers = [getattr(d, "slice_index", None) or 0 for d in devices]
    if len(set(numbers)) == 1 and devices[0].platform != "tpu":
        count = math.prod(max(getattr(c, f"dcn_{axis}"), 1) for axis in AXES)
        if len(devices) % count == 0:
            ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
            return [list(part) for part in np.array(ordered, dtype=object).reshape(count, -1)]
    groups = [[d for d, k in zip(devices, numbers, strict=True) if k == number] for number in sorted(set(numbers))]
    if len({len(g) for g in groups}) > 1:
        sizes = ", ".join(str(len(g)) for g in groups)
        raise InputError(f"The slices have {sizes} devices; a mesh takes slices of equal size.")
    return groups


def _fill(c: MeshConfig, prefix: str, count: int, what: str) -> list[int]:
    """Return the sizes of the axes, their product `count`, with the -1 filled in."""
    sizes = [getattr(c, prefix + axis) for axis in AXES]
    named = ", ".join(f"mesh.{prefix}{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or 0 in sizes:
        raise InputError(f"The mesh is {named}; every size is at least 1, and only one of them may be -1.")
    fixed = math.prod(size for size in sizes if size > 0)
    if count % fixed or (-1 not in sizes and fixed != count):
        raise InputError(
            f"The mesh is {named} but there {'is' if count == 1 else 'are'} {count} {what}; "
            f"make the product of the sizes {count}."
        )
    return [count // fixed if size == -1 else size for size in sizes]


def _arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange the devices of a slice so that neighbours along an axis are neighbours in the torus."""
    from jax.experimental import mesh_utils

    try:
        return mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):  # a shape that the torus has no rings for
        return np.array(devices, dtype=object).reshape(tuple(shape))


def rules_of(c: MeshConfig) -> dict[str, tuple[str, ...]]:
    """Return the table with the config's overrides.

    Raises:
      InputError: an unknown logical or mesh axis.
    """
    rules = dict(RULES)
    for name, text in c.rules.items():
        axes = tuple(part for part in text.replace(" ", "").split(",") if part not in ("", "none"))
        if name not in RULES:
            raise InputError(f"mesh.rules has {name!r}; there are the logical axes {', '.join(RULES)}.")
        if set(axes) - set(AXES):
            raise InputError(f"mesh.rules.{name} is {text!r}; it takes none or some of {', '.join(AXES)}.")
        rules[name] = axes
    return rules


def spec(axes: tuple[str | None, ...], rules: Mapping[str, tuple[str, ...]] = RULES, what: str = "an array") -> P:
    """Return the partition of an array whose axes have these logical names; `what` it is, for messages.

    Raises:
      ValueError: an unknown name.
      InputError: two axes on one mesh axis.
    """
    unknown = [a for a in axes if a is not None and a not in rules]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r} in {axes}; the table has {', '.join(rules)}.")
    mapped = [() if a is None else rules[a] for a in axes]
    users: dict[str, str] = {}
    for a in filter(None, axes):
        for m in rules[a]:
            if m in users:
                keys = " and ".join(f"mesh.rules.{k}={','.join(rules[k])}" for k in (users[m], a))
                raise InputError(f"{keys} split {what} twice over {m}; map one of them to another axis, or to none.")
            users[m] = a
    return P(*(None if not group else group[0] if len(group) == 1 else group for group in mapped))


def shardings(tree: Any, mesh: Mesh, c: MeshConfig | None = None) -> Any:
    """Return a tree prefix of `NamedSharding`: by its axes for each `nnx.Variable`, replicated for anything else.

    Works on a whole training state, since optax keeps the variables in its moments.

    Raises:
      InputError: a dimension is not a multiple of the devices along its mesh axes, or a large array is replicated.
    """
    c = c or MeshConfig()
    rules = rules_of(c)

    def one(path: tuple, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nnx.Variable) or not jax.tree.leaves(leaf):  # Muon's state has empty variables
            return NamedSharding(mesh, P())
        axes = leaf.get_metadata()["axes"]
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        partition = spec(axes, rules, name)
        for k, (size, axis) in enumerate(zip(leaf.shape, axes, strict=True)):
            over = rules[axis] if axis else ()
            ways = math.prod(mesh.shape[a] for a in over)
            if size % ways:
                named = " x ".join(f"mesh.{a}={mesh.shape[a]}" for a in over)
                raise InputError(
                    f"{name} has a dimension of {size} ({axis}, axis {k}), which {named} does not divide; "
                    f"{_divisors(tree, rules, over)} would."
                )
        _check_replicated(name, leaf, axes, partition, mesh, c)
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _divisors(tree: Any, rules: Mapping[str, tuple[str, ...]], over: tuple[str, ...]) -> str:
    """List the sizes that divide every dimension mapped to the mesh axes `over`."""
    common = 0
    for v in jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, nnx.Variable)):
        if isinstance(v, nnx.Variable) and jax.tree.leaves(v):
            for size, axis in zip(v.shape, v.get_metadata()["axes"], strict=True):
                common = math.gcd(common, size) if axis and rules[axis] == over else common
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)


def _check_replicated(name: str, leaf: Any, axes: tuple, partition: P, mesh: Mesh, c: MeshConfig) -> None:
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    mib = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize / 2**20
    used = [a for part in partition if part for a in ((part,) if isinstance(part, str) else part)]
    if split > 1 and mib > c.max_replicated and all(mesh.shape[a] == 1 for a in used):
        raise InputError(
            f"{name}, {list(leaf.shape)} with the axes {axes}, lies whole on every device ({mib:.0f} MiB, and "
            f"mesh.max_replicated is {c.max_replicated}) although the mesh has fsdp={mesh.shape['fsdp']} and "
            f"tensor={mesh.shape['tensor']}; split one of its axes by mesh.rules, or raise mesh.max_replicated."
        )


def placed(shapes: Any, mesh: Mesh, c: MeshConfig | None = None) -> Any:
    """Return the shapes of a state, each with the sharding that `shardings` gives it."""

    def place(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), part)

    return jax.tree.map(place, shardings(shapes, mesh, c), shapes)


def check(c: Config, mesh: Mesh) -> None:
    """Raise `InputError` unless `mesh.rules` makes sense and microbatches, heads and positions divide over the mesh.

    So it does if the kernel that `model.attention_impl` names is not to be had for these devices and heads.
    """
    rules_of(c.mesh)
    _check_kernel(c, mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch, accumulate, context = c.data.batch_size, c.train.accumulate, c.data.context
    if batch // accumulate % ways:
        raise InputError(
            f"data.batch_size is {batch}, in {accumulate} microbatches, over mesh.data x mesh.fsdp = {ways} "
            f"devices; make it a multiple of {accumulate * ways}."
        )
    if c.unit == "images" and mesh.shape["sequence"] > 1:
        raise InputError(
            f"mesh.sequence is {mesh.shape['sequence']}, but images have no positions to split over it; set it to 1 "
            "and give the devices to mesh.data or mesh.fsdp."
        )
    for key, size, axis in (("data.context", context, "sequence"), ("model.heads", c.model.heads, "tensor")):
        if size % mesh.shape[axis]:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise InputError(f"{key} is {size}, which mesh.{axis}={mesh.shape[axis]} does not divide; {fitting} would.")


def _check_kernel(c: Config, mesh: Mesh) -> None:
    if c.model.attention_impl != "flash" or not c.model.heads:
        return
    heads: Any = jax.ShapeDtypeStruct((1, 1, 1, 1, c.model.width // c.model.heads), jnp.dtype(c.model.dtype))
    one = Mesh(mesh.devices.flat[:1], "data", axis_types=(AxisType.Auto,))
    with jax.set_mesh(one):
        missing = unsupported(heads, heads, heads, DotScore(), Mask(), Normalization())
    if missing:
        raise InputError(f"model.attention_impl is flash. {missing} Set it to auto, or to blockwise.")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the rows of a global batch that this process's devices hold, in order."""
    size = batch_size // math.prod(mesh.shape[a] for a in ROWS)
    return np.concatenate([np.arange(block * size, (block + 1) * size) for block in _blocks(mesh)])


def _blocks(mesh: Mesh) -> list[int]:
    """Return which of the equal blocks of rows this process's devices hold, in order."""
    ways = math.prod(mesh.shape[a] for a in ROWS)
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((ways,))
    return sorted({index[0].start or 0 for index in held.values() if index is not None})


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch (`local_rows`) on its devices, as rows of the global arrays."""
    sharding = NamedSharding(mesh, BATCH)
    ways, blocks = math.prod(mesh.shape[a] for a in ROWS), _blocks(mesh)

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) // len(blocks)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            at = blocks.index((index[0].start or 0) // size) * size
            return local[at : at + size]

        return jax.make_array_from_callback((ways * size, *local.shape[1:]), sharding, part)

    return {k: put(v) for k, v in batch.items()}


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Ask the compiler to lay an activation out along these mesh axes; without a mesh in force, or one device, nothing.

    The mesh in force is that of `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def activation(x: jax.Array) -> jax.Array:
    """Lay (b, t, d) out as the residual stream: rows over data and fsdp, positions over sequence."""
    return constrain(x, ROWS, "sequence" if x.shape[1] != 1 else None, None)


def looked_up(table: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
    """Return table(ids), (b, t, d), laid out as `activation`.

    Each device looks the rows of its fsdp group up in its own columns of the table, and an all-to-all then gives it all
    columns of its own rows: the table, which is larger, stays where it is.
    """
    return activation(constrain(table(constrain(ids, "data", None)), "data", None, "fsdp"))


def fetched(state: nnx.State) -> nnx.State:
    """Return a layer's state gathered over all axes but `tensor`, which keeps its share.

    Convolutions need it: left to itself, XLA gives wrong numbers on a mesh that splits rows over data and fsdp, and
    kernels over fsdp and tensor (jax 0.10).
    """

    def one(v: nnx.Variable) -> nnx.Variable:
        names = v.get_metadata()["axes"][-v.ndim :]  # a layer of a stack has one axis less than names
        kept = ("tensor" if name and RULES[name] == ("tensor",) else None for name in names)
        return v.replace(constrain(v.get_value(), *kept))

    return jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def split_axes(*axes: str) -> tuple[str, ...]:
    """Return which of these axes the mesh in force has more than one device along."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for a in axes if mesh.shape.get(a, 1) > 1)


def attend_over_mesh(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, how: Any
) -> jax.Array:
    """Return attend(q, k, v, mask, how), each device attending for its own rows, queries and heads.

    A device has its block of the queries (b, t, h, k), and of the keys and values (b, s, g, k) its rows and heads,
    gathered over `sequence`; their gradients are summed and scattered on the way back. `how` is a tree of whatever else
    has a gradient, numbers or one a head, (h,), whose gradients are added up once. Where an axis of the mesh does not
    divide what it would split, all is left to the compiler.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), split_axes(*AXES)
    (b, t, h), (s, g) = q.shape[:3], k.shape[1:3]
    rows = tuple(a for a in axes if a in ROWS) or None
    sequence, tensor = (a if a in axes else None for a in ("sequence", "tensor"))
    sizes = dict(data=b, fsdp=b // mesh.shape.get("data", 1), sequence=t, tensor=g)
    if not axes or any(sizes[a] % mesh.shape[a] for a in axes):
        return attend(q, k, v, mask, how)
    gather = sequence is not None and s % mesh.shape["sequence"] == 0
    if mask.dense is not None:
        mask = replace(mask, dense=mask.dense.reshape((1,) * (4 - mask.dense.ndim) + mask.dense.shape))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, how: Any) -> jax.Array:
        if gather:
            k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
        if sequence:
            mask = mask.of_queries(jax.lax.axis_index("sequence") * q.shape[1], q.shape[1])
        return attend(q, k, v, mask, how)

    def of_mask(path: tuple, x: Any) -> P:
        if jax.tree_util.keystr(path) != ".dense":
            return P(rows) if jnp.ndim(x) else P()
        return P(rows if x.shape[0] == b else None, tensor if x.shape[1] == h else None)

    keys = P(rows, sequence if gather else None, tensor)
    specs = (
        jax.tree_util.tree_map_with_path(of_mask, mask),
        jax.tree.map(lambda x: P(tensor) if jnp.shape(x) == (h,) else P(), how),
    )
    block = P(rows, sequence, tensor)
    return jax.shard_map(
        local,
        in_specs=(block, keys, keys, *specs),
        out_specs=block,
        axis_names={a for a in AXES if a in mesh.shape},
        check_vma=False,
    )(q, k, v, mask, how)


def over_batch(f: Callable[..., tuple[Any, Any, Any]], weights: jax.Array, *rows: jax.Array) -> tuple[Any, Any, Any]:
    """Return f(weights, *rows), computed by each device on its own part of the rows (b, t, ...) and added up.

    Args:
      f: returns sums over the rows, an array (b, t, ...) or None, and an array like `weights`, again a sum, or None.
      weights: (d, ...), gathered once; the sum that is like them is scattered over fsdp again.
      *rows: (b, t, ...) arrays, split over data, fsdp and sequence.
    """
    axes = split_axes(*ROWS, "sequence")
    if not axes:
        return f(weights, *rows)
    block = P(tuple(a for a in axes if a in ROWS) or None, "sequence" if "sequence" in axes else None)
    scatter = "fsdp" in axes and weights.shape[0] % jax.sharding.get_abstract_mesh().shape["fsdp"] == 0

    def local(weights: jax.Array, *rows: jax.Array) -> tuple[Any, Any, Any]:
        sums, each, slope = f(weights, *rows)
        if slope is not None and scatter:
            slope = jax.lax.psum_scatter(slope, "fsdp", tiled=True)
        rest = tuple(a for a in axes if not (scatter and a == "fsdp"))
        return jax.lax.psum(sums, axes), each, jax.lax.psum(slope, rest) if rest else slope

    return jax.shard_map(
        local,
        in_specs=(P(), *(block for _ in rows)),
        out_specs=(P(), block, P("fsdp") if scatter else P()),
        axis_names=set(axes),
        check_vma=False,
    )(weights, *rows)
