"""Topologies by their number of chips; nothing here imports JAX."""

from aether.chips import CHIPS, Topology, topology
from aether.errors import InputError


def sizes(text: str) -> list[int]:
    """Read `16,64,256`.

    Raises:
      InputError: not growing whole numbers.
    """
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() for part in parts) or sorted({int(p) for p in parts}) != [int(p) for p in parts]:
        raise InputError(f"--scaling is {text!r}; write growing numbers of chips, as in 16,64,256.")
    return [int(part) for part in parts]


def topology_of(generation: str, chips: int) -> Topology:
    """Return the most compact slice of that many chips, or several of the largest.

    Raises:
      InputError: there is none.
    """
    if generation not in CHIPS:
        raise InputError(f"--topology is {generation!r}; with --scaling it begins with one of {', '.join(CHIPS)}.")
    chip = CHIPS[generation]
    if chip.node:
        return topology(f"{generation}:{chips}")
    made = {topology(f"{generation}:{shape}").chips: shape for shape in chip.shapes}
    largest = max(made)
    if chips in made:
        return topology(f"{generation}:{made[chips]}")
    if chips % largest == 0:
        return topology(f"{generation}:{made[largest]}", chips // largest)
    raise InputError(
        f"--scaling has {chips} chips; {generation} comes with {', '.join(str(n) for n in made)} or a multiple of "
        f"{largest}."
    )
