"""The batches, rematerialisations and meshes of one topology that fit, best first, found in limited time."""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aether import parallel
from aether.chips import Topology
from aether.config import Config, MeshConfig
from aether.errors import InputError
from aether.plan.machine import devices_of
from aether.plan.measure import Plan, make_plan
from aether.plan.memory import bytes_on_device
from aether.train.setup import describe_state

REMATS = ("none", "dots", "full", "offload")  # from most kept on the device to least
ROWS = (1, 2, 4, 8, 16, 32, 64)  # sequences or images a device


@dataclass(frozen=True)
class Candidate:
    """A config to try, with the bytes its state takes on a device and the least its activations will."""

    config: Config
    rows: int
    state: int
    least: int

    @property
    def place(self) -> MeshConfig:
        """Return its mesh."""
        return self.config.mesh

    @property
    def shape(self) -> tuple[int, int, str]:
        """Return what it has in common with candidates of other batches."""
        return self.place.fsdp, self.place.tensor, self.config.model.remat

    def __str__(self) -> str:
        m, d = self.config.mesh, self.config.data
        return f"batch {d.batch_size}, remat {self.config.model.remat}, data {m.data} fsdp {m.fsdp} tensor {m.tensor}"


@dataclass
class Search:
    """What was found: plans in the order they were made, and how many candidates were left out, by reason."""

    plans: list[Plan] = field(default_factory=list)
    pruned: Counter[str] = field(default_factory=Counter)

    def frontier(self) -> list[Plan]:
        """Return the plans that fit and that no other beats in both rate and memory, the fastest first."""
        ranked = sorted(
            (p for p in self.plans if p.fits and p.rate_bound),
            key=lambda p: (-(p.rate_bound or 0), p.memory.total),
        )
        kept: list[Plan] = []
        for plan in ranked:
            if not kept or plan.memory.total < kept[-1].memory.total:
                kept.append(plan)
        return kept


def search(
    config: Config,
    target: Topology,
    seconds: float,
    say: Callable[[str], None],
    *,
    fixed_batch: bool = False,
    clock: Callable[[], float] = time.monotonic,
    measure: Callable[[Config, Topology, list[Any]], Plan] = make_plan,
) -> Search:
    """Plan the candidates, the likely best first, until all are tried or refused, or `seconds` are over.

    What does not divide, or whose state and least activations exceed the memory, is left out before anything is
    compiled; what keeps more than a candidate that did not fit (a larger batch, less recomputed) after it.

    Args:
      config: resolved.
      target: where.
      seconds: no compilation begins when it would end later, by the time of those before.
      say: takes progress.
      fixed_batch: try `data.batch_size` alone.
      clock: in seconds.
      measure: makes a plan.
    """
    found, begin = Search(), clock()
    devices = devices_of(target)
    left = list(candidates(config, target, devices, found.pruned, fixed_batch))
    say(f"{len(left)} candidates to compile; {_told(found.pruned) or 'none'} left out before")
    took: list[float] = []
    while left:
        candidate = left.pop(0)
        now = clock() - begin
        mean = sum(took) / len(took) if took else 0.0
        if now + mean > seconds:
            found.pruned["not reached in time"] += 1 + len(left)
            break
        n = len(left) + 1
        say(f"{now:5.0f} s of {seconds:.0f}; {n} left, about {mean * n:.0f} s; now {candidate}")
        try:
            plan = measure(candidate.config, target, devices)
        except InputError as error:
            found.pruned[f"refused ({str(error).split(';')[0]})"] += 1
            continue
        finally:
            took.append(clock() - begin - now)
        found.plans.append(plan)
        if not plan.fits:
            kept = [c for c in left if not _keeps_more(c, candidate)]
            found.pruned["keep more than one that did not fit"] += len(left) - len(kept)
            left = kept
    return found


def candidates(
    config: Config, target: Topology, devices: list[Any], pruned: Counter[str], fixed_batch: bool = False
) -> Iterator[Candidate]:
    """Yield what may fit: of every mesh and remat the largest batch first, meshes by how little they send."""
    usable = target.chip.usable
    found = []
    for mesh_config in meshes(config.mesh, len(devices) // target_slices(target)):
        try:
            mesh = parallel.make_mesh(mesh_config, devices)
            _, _, like = describe_state(dataclasses.replace(config, mesh=mesh_config), mesh)
            parallel.check(_with(config, mesh_config, config.model.remat, _ways(mesh)), mesh)
        except InputError:
            pruned["meshes that do not divide"] += 1
            continue
        state = bytes_on_device(like)
        if state > usable:
            pruned["meshes whose state does not fit"] += 1
            continue
        for rows, remat in itertools.product(ROWS, REMATS):
            batch = rows * _ways(mesh)
            if fixed_batch and batch != config.data.batch_size:
                continue
            made = _with(config, mesh_config, remat, batch)
            candidate = Candidate(made, rows, state, least_activations(made, mesh))
            if state + candidate.least > usable:
                pruned["state and activations do not fit"] += 1
            else:
                found.append(candidate)
    most = {c.shape: c.rows for c in found}  # the largest: rows come in rising order

    def order(c: Candidate) -> tuple[int, ...]:
        return most[c.shape] // c.rows, c.place.tensor, c.place.fsdp, REMATS.index(c.config.model.remat)

    yield from sorted(found, key=order)


def target_slices(target: Topology) -> int:
    """Return the slices that a mesh has to span (the nodes of GPUs are within `mesh.data`)."""
    return target.slices if target.is_tpu else 1


def meshes(c: MeshConfig, devices: int) -> Iterator[MeshConfig]:
    """Yield every factoring of a slice's devices into data, fsdp and tensor; sequence stays as it is."""
    rest = devices // max(c.sequence, 1)
    for fsdp in divisors(rest):
        for tensor in divisors(rest // fsdp):
            yield dataclasses.replace(c, data=rest // fsdp // tensor, fsdp=fsdp, tensor=tensor)


def divisors(n: int) -> list[int]:
    """Return the divisors of n in order."""
    return [k for k in range(1, n + 1) if n % k == 0]


def least_activations(config: Config, mesh: Any) -> int:
    """Return bytes a device cannot do without: what blocks keep for the backward pass, and the gradients in float32.

    A block keeps its input, float32; with remat=dots also its bfloat16 products, and with none at least as much.
    """
    m, d = config.model, config.data
    tokens = d.batch_size * d.context // config.train.accumulate // (_ways(mesh) * mesh.shape["sequence"])
    stream = 0 if m.remat == "offload" else 4 * m.width
    dots = 2 * (4 * m.width + m.hidden) // mesh.shape["tensor"] if m.remat in ("none", "dots") else 0
    return m.layers * tokens * (stream + dots)


def _with(config: Config, mesh: MeshConfig, remat: str, batch: int) -> Config:
    model = dataclasses.replace(config.model, remat=remat, remat_names="")
    data = dataclasses.replace(config.data, batch_size=batch * config.train.accumulate)
    return dataclasses.replace(config, mesh=mesh, model=model, data=data)


def _ways(mesh: Any) -> int:
    return math.prod(mesh.shape[a] for a in parallel.ROWS)


def _keeps_more(c: Candidate, refused: Candidate) -> bool:
    order = REMATS.index
    return (
        c.place == refused.place
        and c.rows >= refused.rows
        and order(c.config.model.remat) <= order(refused.config.model.remat)
    )


def _told(pruned: Counter[str]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in pruned.most_common())
