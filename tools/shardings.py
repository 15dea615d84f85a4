"""Print how a mesh splits each array of the training state, and what a device holds of it.

python -m tools.shardings --config=configs/aether_124m.py --config.mesh.fsdp=8 --devices=8
python -m tools.shardings --config=configs/aether_124m.py --vocab=50257 --topology=v5e:16x16 --slices=2 --optimizer

Nothing is allocated. --devices makes that many CPU devices; --topology needs pip install 'aether[plan]'.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from aether.errors import InputError
from launch import cli

FLAGS = cli.new_flags(config=True)
flags.DEFINE_integer("devices", 0, "devices of the mesh", 0, flag_values=FLAGS)
flags.DEFINE_string("topology", "", "or a topology such as v5p:8x8x8", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "slices of that topology", 1, flag_values=FLAGS)
flags.DEFINE_integer("vocab", 0, "ids of the tokenizer, or classes (0: by the config)", 0, flag_values=FLAGS)
flags.DEFINE_bool("optimizer", False, "the optimizer's state, too", flag_values=FLAGS)

HEAD = ("array", "shape", "dtype", "logical axes", "mesh axes", "bytes a device")


def main(args: flags.FlagValues) -> None:
    """Print the table."""
    config = cli.config_of(args)
    if bool(args.devices) == bool(args.topology):
        raise InputError("Give one of --devices, as in --devices=8, and --topology, as in --topology=v5e:4x4.")
    from aether.chips import topology
    from aether.plan import machine

    target = topology(args.topology, args.slices) if args.topology else None
    if target:
        machine.prepare([target], args.debug)
    else:
        os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(args.devices))
    import jax

    from aether import parallel
    from aether.plan.measure import resolved
    from aether.train.setup import describe_state

    devices = machine.devices_of(target) if target else jax.devices("cpu")[: args.devices]
    mesh = parallel.make_mesh(config.mesh, devices)
    _, _, like = describe_state(resolved(config, args.vocab), mesh)
    parts = {"params": like.params} | ({"opt_state": like.opt_state} if args.optimizer else {})
    if jax.tree.leaves(like.extras):
        parts["extras"] = like.extras
    if like.ema is not None:
        parts["ema"] = like.ema
    sizes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
    print(f"{mesh.size} devices: {sizes}\n")
    print_table(list(rows(parts, mesh.size)))


def rows(parts: dict[str, Any], devices: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each array and a total for each part: how much one device holds, and how much there is."""
    import jax
    from flax import nnx

    from aether.plan.memory import bytes_on_device
    from aether.plan.report import size

    for part, tree in parts.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda v: isinstance(v, nnx.Variable))
        for path, leaf in leaves:
            for shape in jax.tree.leaves(leaf):
                name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
                axes = leaf.get_metadata()["axes"] if isinstance(leaf, nnx.Variable) else ()
                yield (
                    name,
                    "x".join(map(str, shape.shape)) or "scalar",
                    str(shape.dtype),
                    ", ".join(a or "-" for a in axes),
                    ", ".join(
                        "-" if a is None else a if isinstance(a, str) else "+".join(a) for a in shape.sharding.spec
                    ),
                    f"{bytes_on_device(shape):,}",
                )
        whole = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(tree))
        yield (f"{part}: {size(bytes_on_device(tree))} a device, of {size(whole)} in all",)


def print_table(table: list[tuple[str, ...]]) -> None:
    """Print rows under their heads, and totals, which have one cell, as lines of their own."""
    full = [HEAD, *(row for row in table if len(row) > 1)]
    widths = [max(len(cell) for cell in column) for column in zip(*full, strict=True)]
    for row in (HEAD, *table):
        if len(row) == 1:
            print(f"\n{row[0]}\n")
        else:
            cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
            print("  ".join([*cells, row[-1].rjust(widths[-1])]))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
