"""Which devices a collective joins: its groups as HLO writes them, and where those devices lie."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Which device a partition is: the mesh's sizes by axis, and its devices' slices and torus coordinates in order."""

    axes: dict[str, int]
    slices: tuple[int, ...]
    coords: tuple[tuple[int, ...], ...] = ()

    def spanned(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the mesh axes along which these partitions differ."""
        places = np.unravel_index(np.asarray(ids), tuple(self.axes.values()))
        return tuple(a for a, p in zip(self.axes, places, strict=True) if p.min() != p.max())

    def crossing(self, ids: Sequence[int]) -> int:
        """Return how many slices these partitions lie in."""
        return len({self.slices[i] for i in ids})

    @property
    def across(self) -> tuple[str, ...]:
        """Return the mesh axes along which the slice changes."""
        grid = np.asarray(self.slices).reshape(tuple(self.axes.values()))
        return tuple(a for k, a in enumerate(self.axes) if np.ptp(grid, axis=k).any())

    def extended(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the dimensions of the torus along which these partitions differ."""
        if not self.coords:
            return ()
        places = np.array([self.coords[i] for i in ids])
        return tuple(int(k) for k in np.flatnonzero(np.ptp(places, axis=0)))


def members_of(attributes: str, devices: int) -> list[int]:
    """Return the partitions of the largest group (of a permute: those that exchange with partition 0's chain).

    Reads `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}` and
    `source_target_pairs={{0,1},{1,0}}`.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        moves = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
        return list(next(((a, b) for a, b in moves if a != b), (0,)))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? \{([^}]*)\}", attributes
    )
    if named:
        sizes = {k: int(v) for k, v in re.findall(r"'([^']*)'=(\d+)", named.group(1))}
        ids = _iota(named.group(2) or str(devices), named.group(3)).reshape(tuple(sizes.values()))
        over = re.findall(r"'([^']*)'", named.group(4))
        at = tuple(slice(None) if name in over else 0 for name in sizes)
        return [int(n) for n in ids[at].ravel()]
    iota = re.search(r"replica_groups=\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", attributes)
    if iota:
        return [int(n) for n in _iota(iota.group(2), iota.group(3)).reshape(_integers(iota.group(1)))[0].ravel()]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    groups = re.findall(r"\{([\d,]+)\}", listed.group(1)) if listed else []
    return max((_integers(g) for g in groups), key=len) if groups else list(range(devices))


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    shape = _integers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_integers(transpose)) if transpose else ids).ravel()


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
