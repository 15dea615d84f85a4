"""Sizes of the tiles of the TPU kernels, by chip, head width and dtype, from what fits its vector memory (VMEM)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
LANES = 128


@dataclass(frozen=True)
class Chip:
    """VMEM of a core in bytes, and the largest side of a tile in the forward and in the backward pass.

    By the compiler's schedules for v5e, v5p and v6e (bundles a pair of query and key; LOG.md has them): four times the
    tile costs the forward pass a fifth less, the backward pass next to nothing, and what causality excludes is left
    out in smaller pieces by smaller tiles.
    """

    vmem: int
    forward: int
    backward: int


# By the beginning of a device kind; the longest that fits.
CHIPS = {
    "TPU v5 lite": Chip(128 * MIB, 1024, 512),
    "TPU v5e": Chip(128 * MIB, 1024, 512),
    "TPU v5": Chip(64 * MIB, 1024, 512),
    "TPU v6": Chip(128 * MIB, 1024, 512),
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


def blocks_of(
    kind: str, t: int, s: int, width: int, itemsize: int, *, window: int | None = None, backward: bool = False
) -> Blocks:
    """Return the blocks for `t` queries and `s` keys whose wider vectors have `width` entries of `itemsize` bytes.

    A tile has multiples of 128 queries and of 128 keys, not many more than a window. Three quarters of the VMEM may be
    used; a quarter is for the float32 gradients of keys and values, in two buffers each.
    """
    chip = chip_of(kind)
    side = chip.backward if backward or itemsize > 2 else chip.forward  # float32 gains little and compiles for long
    if width * itemsize > 4 * LANES:
        side //= 2
    if window is not None:
        side = min(side, max(2 * LANES, _up(window, LANES)))
    rows, columns = (_up(math.ceil(n / math.ceil(n / side)), LANES) for n in (t, s))
    fits = chip.vmem // 4 // (2 * 2 * 4 * _up(width, LANES))
    held = columns * max(1, min(math.ceil(s / columns), fits // columns))
    return Blocks(rows, columns, held, chip.vmem * 3 // 4)


def _up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
