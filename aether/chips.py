"""What accelerators can do, by their makers' public pages: the one table, in units of a chip, and the pods they form.

TPUs: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of the Cloud TPU documentation
(https://docs.cloud.google.com/tpu/docs); v4's links (2400 Gbit/s a chip) from its launch table, and its data-centre
bandwidth, which no page states, from "How to Scale Your Model" (https://jax-ml.github.io/scaling-book). GPUs: NVIDIA's
data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and HGX B200, dense bf16; their network is 200 (A100) or 400 Gbit/s
a GPU, as in the DGX systems. `hbm_usable` is what the TPU compiler (libtpu 0.0.42) says a program may use of a device.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from aether.errors import InputError

GIB, GB, GBIT = 2**30, 1e9, 1e9 / 8


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    `peak`: bf16 FLOP/s; `hbm`: bytes; `hbm_usable`: bytes a program may use (GPUs: all of them); `hbm_bandwidth`,
    `dcn`: bytes/s, the latter to other slices, one way; `link`: bytes/s one way over one of the `links` to neighbours
    (GPUs: all of NVLink counts as one); `devices`: what JAX sees of a chip; `units`: (matrix units, their side);
    `wrap`: torus dimensions of multiples of this many chips are rings; `node`: GPUs that NVLink joins.
    """

    kinds: tuple[str, ...]
    peak: float
    hbm: int
    hbm_bandwidth: float
    link: float
    links: int
    dcn: float
    hbm_usable: int = 0
    devices: int = 1
    units: tuple[int, int] | None = None
    shapes: tuple[str, ...] = ()
    wrap: int = 0
    node: int = 0

    @property
    def clock(self) -> float | None:
        """Return the matrix units' clock in Hz, peak / (2 · units · side²), or None where their number is unknown."""
        return self.peak / (2 * self.units[0] * self.units[1] ** 2) if self.units else None

    @property
    def usable(self) -> int:
        """Return the bytes of HBM that a program may use on one of the chip's devices."""
        return self.hbm_usable or self.hbm // self.devices


def _tpu(
    kinds: tuple[str, ...],
    *columns: float,
    shapes: tuple[str, ...],
    wrap: int,
    devices: int = 1,
    units: tuple[int, int] | None = None,
) -> Chip:
    tera, hbm, usable, bandwidth, link, links, dcn = columns
    more: dict[str, Any] = dict(hbm_usable=round(usable * GIB), devices=devices, units=units, shapes=shapes, wrap=wrap)
    return Chip(kinds, tera * 1e12, round(hbm * GIB), bandwidth * GB, link * GB, int(links), dcn * GBIT, **more)


def _gpu(kind: str, tera: float, hbm: int, bandwidth: float, nvlink: float, dcn: float) -> Chip:
    return Chip((kind,), tera * 1e12, round(hbm * GB), bandwidth * GB, nvlink * GB, 1, dcn * GBIT, node=8)


# Slices that are sold: all of the flat ones, the common ones of the others.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
LARGE = (*CUBES, "16x16x16", "16x16x24")
V4 = (*CUBES, "12x16x16")

CHIPS: dict[str, Chip] = {
    # bf16 TFLOP/s, HBM GiB, usable GiB a device, HBM GB/s, a link's GB/s one way, links, DCN Gbit/s
    "v4": _tpu(("TPU v4",), 275, 32, 30.75, 1200, 50, 6, 50, shapes=V4, wrap=4, units=(8, 128)),
    "v5e": _tpu(("TPU v5 lite", "TPU v5e"), 197, 16, 15.75, 819, 50, 4, 25, shapes=FLAT, wrap=16, units=(4, 128)),
    "v5p": _tpu(("TPU v5", "TPU v5p"), 459, 96, 95.74, 2765, 100, 6, 50, shapes=LARGE, wrap=4, units=(8, 128)),
    "v6e": _tpu(("TPU v6 lite", "TPU v6e"), 918, 32, 31.25, 1638, 100, 4, 100, shapes=FLAT, wrap=16),
    "tpu7x": _tpu(("TPU7x",), 2307, 192, 94.75, 7380, 100, 6, 100, shapes=LARGE, wrap=4, devices=2),
    # bf16 TFLOP/s, HBM GB, HBM GB/s, NVLink's GB/s one way, network Gbit/s
    "a100": _gpu("NVIDIA A100", 312, 80, 2039, 300, 200),
    "h100": _gpu("NVIDIA H100", 989, 80, 3350, 450, 400),
    "h200": _gpu("NVIDIA H200", 989, 141, 4800, 450, 400),
    "b200": _gpu("NVIDIA B200", 2250, 180, 7700, 900, 400),
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip whose name `device_kind` begins with, the longest if several do."""
    named = [(name, chip) for chip in CHIPS.values() for name in chip.kinds if device_kind.startswith(name)]
    return max(named, key=lambda pair: len(pair[0]))[1] if named else None


@dataclass(frozen=True)
class Topology:
    """Slices of one kind of chip; the shape of GPUs is their number."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Return what a chip can do."""
        return CHIPS[self.generation]

    @property
    def is_tpu(self) -> bool:
        """Say whether there is a compiler for it."""
        return self.chip.node == 0

    @property
    def chips(self) -> int:
        """Return the chips of all slices."""
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        text = f"{self.generation}:{'x'.join(str(n) for n in self.shape)}"
        return f"{self.slices} x {text}" if self.slices > 1 else text


def topology(text: str, slices: int = 1) -> Topology:
    """Read `v5p:8x8x8` or `h100:16`.

    Raises:
      InputError: there is no such chip, or it does not come in this shape.
    """
    generation, _, shape = text.partition(":")
    if generation not in CHIPS:
        examples = ", ".join(f"{name}:{chip.shapes[-1] if chip.shapes else chip.node}" for name, chip in CHIPS.items())
        raise InputError(f"--topology is {text!r}; there are topologies such as {examples}.")
    chip = CHIPS[generation]
    if chip.node:
        if not re.fullmatch(r"[1-9]\d*", shape) or (int(shape) > chip.node and int(shape) % chip.node):
            raise InputError(
                f"--topology is {text!r}; {generation} takes 1 to {chip.node} GPUs or a multiple of {chip.node}, "
                f"as in {generation}:{chip.node}."
            )
        nodes = max(int(shape) // chip.node, 1) if slices == 1 else slices
        if slices > 1:
            raise InputError(f"--slices is {slices} and --topology {text!r}; the slices of GPUs are their nodes.")
        return Topology(generation, (int(shape) // nodes,), nodes)
    if shape not in chip.shapes:
        raise InputError(f"--topology is {text!r}; {generation} comes as {', '.join(chip.shapes)}.")
    return Topology(generation, tuple(int(n) for n in shape.split("x")), slices)
