"""The least time that a step can take, resource by resource, from what one device does in it.

  compute   FLOPs of matrix products / bf16 peak
  hbm       bytes between HBM and chip, of this program, / its bandwidth; 0 for GPUs, whose program is not known
  ici       along each dimension of the torus, the bytes of the collectives that use it / the bandwidth of its links;
            a collective over several dimensions is spread over their links. A dimension that is a ring has two links
            a chip, an open one counts as one (its ends have no more). GPUs: bytes / NVLink's bandwidth.
  dcn       bytes to and from other slices / the chip's share of its host's network

`bound` is the largest: nothing is faster even if everything overlaps. `serial` is the sum: nothing overlaps.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from aether.chips import Topology
from aether.plan.collectives import Collective
from aether.plan.counts import Counts


@dataclass(frozen=True)
class Roofline:
    """Seconds a step by resource, 0 where unknown; `cycles` is the compiler's estimate of all but collectives."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    cycles: float | None

    @property
    def bound(self) -> float:
        """Return the largest."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def serial(self) -> float:
        """Return the sum of computing, at the speed of the slower of matrix units and HBM, and of all transfers."""
        return max(self.compute, self.hbm) + self.ici + self.dcn

    @property
    def limited_by(self) -> str:
        """Return the resource that takes longest."""
        times = {name: getattr(self, name) for name in ("compute", "hbm", "ici", "dcn")}
        return max(times, key=lambda name: times[name])


def roofline(counts: Counts, found: Sequence[Collective], topology: Topology) -> Roofline:
    """Return the times of a step on one device of a topology."""
    chip = topology.chip
    dcn = sum(c.bytes for c in found if c.link == "dcn") / (chip.dcn / chip.devices)
    clock = chip.clock
    return Roofline(
        compute=counts.flops / (chip.peak / chip.devices),
        hbm=(counts.hbm_bytes or 0) / (chip.hbm_bandwidth / chip.devices),
        ici=_ici([c for c in found if c.link == "ici"], topology),
        dcn=dcn,
        cycles=counts.cycles / clock if counts.cycles is not None and clock else None,
    )


def _ici(found: Sequence[Collective], topology: Topology) -> float:
    chip = topology.chip
    if not topology.is_tpu:
        return sum(c.bytes for c in found) / (chip.link * chip.links)
    busy: dict[int, float] = defaultdict(float)
    for c in found:
        links = {k: _links(topology, k) for k in c.torus if k < len(topology.shape)}
        for k in links:
            busy[k] += c.bytes / (sum(links.values()) * chip.link / chip.devices)
    return max(busy.values(), default=0.0)


def _links(topology: Topology, dimension: int) -> int:
    size, wrap = topology.shape[dimension], topology.chip.wrap
    return 2 if size > 2 and size % wrap == 0 else 1
