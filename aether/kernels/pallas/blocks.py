"""Sizes of the tiles of the TPU kernels, by chip, head width and dtype, from what fits its vector memory (VMEM)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
LANES = 128


@dataclass(frozen=True)
class Chip:
    """VMEM of a core in bytes, and the tile sides that suit its units."""

    vmem: int
    rows: int
    columns: int


# Longest matching name of a device kind.
CHIPS = {
    "TPU v5 lite": Chip(128 * MIB, 512, 512),
    "TPU v5e": Chip(128 * MIB, 512, 512),
    "TPU v5": Chip(64 * MIB, 512, 512),
    "TPU v6": Chip(128 * MIB, 512, 512),
}
DEFAULT = Chip(16 * MIB, 256, 256)


class Blocks(NamedTuple):
    """Queries and keys in a tile, keys whose gradients are held in VMEM at once, and bytes of VMEM to ask for."""

    rows: int
    columns: int
    held: int
    vmem: int


def chip_of(kind: str) -> Chip:
    """Return the entry for a device kind."""
    names = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else DEFAULT


def blocks_of(kind: str, t: int, s: int, width: int, itemsize: int) -> Blocks:
    """Return the blocks for `t` queries and `s` keys whose wider vectors have `width` entries of `itemsize` bytes.

    A tile has multiples of 128 queries and of 128 keys. Half of the chip's VMEM is for the tiles; of the other half the
    gradients of keys and values take what they need, in float32 and in two buffers each.
    """
    chip = chip_of(kind)
    wide = 2 if width * itemsize > 4 * LANES else 1  # of float32 with more than 128, or bfloat16 with more than 256
    rows, columns = (min(side // wide, _up(n, LANES)) for side, n in ((chip.rows, t), (chip.columns, s)))
    budget = chip.vmem // 4
    a_key = 2 * 2 * 4 * _up(width, LANES)
    held = max(columns, min(_up(s, columns), budget // a_key // columns * columns))
    return Blocks(rows, columns, held, chip.vmem * 3 // 4)


def _up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
