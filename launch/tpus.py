"""What Google Cloud calls its TPUs, and how many chips a machine has: on TPU VMs and in Kubernetes' node pools."""

import math
from dataclasses import dataclass

from aether.chips import CHIPS, topology
from aether.errors import InputError


@dataclass(frozen=True)
class Kind:
    """One generation.

    Attributes:
      family: what stands before the number of an accelerator type, v5litepod in v5litepod-16; "" without TPU VMs.
      counts: what that number counts, a chip: TensorCores or chips.
      pool: GKE's name, "" where it has none.
      one: chips of the largest slice on one machine; the machines of a larger one have 4.
    """

    family: str
    counts: int = 1
    pool: str = ""
    one: int = 4

    def machines(self, chips: int) -> int:
        """Return the machines of a slice."""
        return 1 if chips <= self.one else -(-chips // 4)


KINDS = {
    "v2": Kind("v2", 2),
    "v3": Kind("v3", 2),
    "v4": Kind("v4", 2, "tpu-v4-podslice"),
    "v5e": Kind("v5litepod", 1, "tpu-v5-lite-podslice", 8),
    "v5p": Kind("v5p", 2, "tpu-v5p-slice"),
    "v6e": Kind("v6e", 1, "tpu-v6e-slice", 8),
    "tpu7x": Kind("", 2, "tpu7x"),
}
FAMILIES = {kind.family: name for name, kind in KINDS.items() if kind.family}


def read(accelerator: str) -> tuple[Kind, int]:
    """Read `v5p-128` as v5p with 64 chips.

    Raises:
      InputError: there is no such family, or it has no slice of that size.
    """
    family, _, text = accelerator.rpartition("-")
    if family not in FAMILIES or not text.isdecimal():
        raise InputError(f"--accelerator is {accelerator!r}; it takes {', '.join(f'{f}-N' for f in FAMILIES)}.")
    name, number = FAMILIES[family], int(text)
    kind = KINDS[name]
    near = _near(name, number)
    if near != [number]:
        what = "its TensorCores, two a chip and eight a machine" if kind.counts == 2 else "its chips"
        names = " or ".join(f"{family}-{n}" for n in near)
        raise InputError(f"--accelerator is {accelerator!r}, where the number is that of {what}; give {names}.")
    return kind, number // kind.counts


def _near(name: str, number: int) -> list[int]:
    """Return `number` if there are such slices, else the next below and above it."""
    shapes = CHIPS[name].shapes if name in CHIPS else ()
    sizes = sorted(math.prod(int(n) for n in shape.split("x")) * KINDS[name].counts for shape in shapes)
    if KINDS[name].counts == 2:  # cubes join to more sizes than the table has: all that fill their machines
        most = sizes[-1] if sizes else math.inf
        if number > most:
            return [int(most)]
        low = number // 8 * 8
        return [number] if low == number > 0 else [n for n in (low, low + 8) if n]
    if number in sizes:
        return [number]
    return [*[n for n in sizes if n < number][-1:], *[n for n in sizes if n > number][:1]]


def accelerator_of(text: str) -> str:
    """Return the accelerator type with the chips of `v5p:4x4x4`."""
    t = topology(text)
    kind = KINDS.get(t.generation)
    if kind is None or not kind.family:
        raise InputError(f"--topology is {text!r}; TPU VMs are v4, v5e, v5p and v6e: use launch.gke for others.")
    return f"{kind.family}-{t.chips * kind.counts}"
