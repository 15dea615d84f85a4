"""The collectives of a program: what they move, along which mesh axes, how often, and whose they are.

`bytes` of a collective are what one device receives in a step if each ring is used well, for a group of g devices, an
operand of V bytes and a result of R bytes:

  all-gather       R (g - 1) / g        reduce-scatter       V (g - 1) / g
  all-reduce       2 V (g - 1) / g      all-to-all           V (g - 1) / g
  collective-permute, send              V
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from aether.plan.hlo import FUSED, Instruction, Module, Visit
from aether.plan.layout import Layout, members_of
from aether.plan.origin import parameter_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
START = 'custom_call_target="AsyncCollectiveStart"'
MEGASCALE = '_xla_megascale_transfer_type="'  # on a `send` of the TPU compiler: its part of a collective across slices


@dataclass(frozen=True)
class Collective:
    """All runs of one collective in a step.

    `link` is ici within a slice and dcn across slices; `bytes` is as the module says, for all runs together; `operand`
    and `result` are the bytes of one run on one device; `torus` lists the torus dimensions the group extends along.
    """

    kind: str
    link: str
    axes: tuple[str, ...]
    group: int
    dtype: str
    operand: int
    result: int
    count: int
    bytes: int
    in_loop: bool
    parameter: str
    source: str
    phase: str
    torus: tuple[int, ...]


def collectives(module: Module, layout: Layout) -> list[Collective]:
    """List the collectives, those that are alike in all but size added up, by falling bytes."""
    visits = list(module.walk())
    started = {_channel(v.instruction) for v in visits if _kind(v.instruction) and _starts(v)}
    found: dict[tuple, Collective] = {}
    for visit in visits:
        for c in _read(module, layout, visit, started):
            key = (c.kind, c.link, c.axes, c.group, c.dtype, c.operand, c.in_loop, c.parameter, c.source, c.phase)
            old = found.get(key)
            found[key] = replace(c, count=c.count + old.count, bytes=c.bytes + old.bytes) if old else c
    return sorted(found.values(), key=lambda c: -c.bytes)


def _kind(i: Instruction) -> str:
    kind = i.opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _channel(i: Instruction) -> tuple[str, str]:
    """Return what the pieces of one collective have in common."""
    return _kind(i), i.attribute("channel_id") or i.op_name


def _starts(visit: Visit) -> bool:
    """Return whether an instruction lies in a fusion, perhaps some fusions deep, that begins a collective."""
    here = visit.computation
    for caller, above in reversed(visit.callers):
        if caller.opcode not in FUSED:
            return False
        if any(START in i.attributes for i in here.instructions.values()):
            return True
        here = above
    return False


def _read(module: Module, layout: Layout, visit: Visit, started: set) -> Iterator[Collective]:
    """Yield what an instruction says: nothing, one collective, or two where a group crosses slices.

    The TPU compiler spreads one collective over several fusions (start, steps beside other work, perhaps in loops, and
    done), all with its channel: only the start counts.
    """
    i, here = visit.instruction, visit.computation
    if i.opcode == "send" and MEGASCALE in i.attributes:
        yield _across(module, layout, visit)
        return
    kind = _kind(i)
    if not kind or (visit.fused and _channel(i) in started and not _starts(visit)):
        return
    operands = [s for name in i.operands if name in here.instructions for s in here.instructions[name].shapes]
    operand = sum(s.bytes for s in operands)
    starts = i.opcode.endswith("-start") and kind != "all-reduce"  # whose result is (operands, results, ...)
    result = sum(s.bytes for s in i.shapes[len(operands) : 2 * len(operands)]) if starts else i.bytes
    members = members_of(i.attributes, len(layout.slices))
    caller = visit.callers[-1][0] if visit.fused else i
    sliced = any(other.opcode == "dynamic-slice" for other in here.instructions.values())
    if kind == "all-reduce" and visit.fused and caller.attribute("kind") == "kCustom" and sliced:
        kind, result = "reduce-scatter", caller.bytes  # the TPU's fusion of the two
    made = Collective(
        kind=kind,
        link="ici",
        axes=layout.spanned(members),
        group=len(members),
        dtype=(i.shapes or operands)[0].dtype,
        operand=operand,
        result=result,
        count=visit.times,
        bytes=visit.times * received(kind, operand, result, len(members)),
        in_loop=visit.in_loop,
        parameter=parameter_of(module, visit),
        source=module.source(i) or module.source(caller),
        phase=phase(i.op_name or caller.op_name),
        torus=layout.extended(members),
    )
    slices = layout.crossing(members)
    if len(members) < 2:
        return
    if slices == 1:
        yield made
    else:
        yield from _hierarchical(made, slices)


def received(kind: str, operand: int, result: int, group: int) -> int:
    """Return the bytes that one device receives in one run, by the formulas of this module."""
    if kind in ("collective-permute", "collective-broadcast"):
        return operand
    whole = result if kind == "all-gather" else operand
    return round((2 if kind == "all-reduce" else 1) * whole * (group - 1) / max(group, 1))


def _hierarchical(c: Collective, slices: int) -> Iterator[Collective]:
    """Split a collective over slices into its part in each slice and that between them, 1/g of it a device."""
    inner = c.group // slices
    if inner > 1:
        yield replace(c, group=inner, bytes=c.count * received(c.kind, c.operand, c.result, inner))
    part = c.count * received(c.kind, c.operand // inner, c.result // inner, slices)
    yield replace(c, link="dcn", group=slices, bytes=part, torus=())


def _across(module: Module, layout: Layout, visit: Visit) -> Collective:
    """Read a `send` to the other slices, which the TPU compiler makes of its part of a collective."""
    i = visit.instruction
    kind = i.attributes.split(MEGASCALE)[1].split('"')[0].lower().replace("_", "-")
    size, slices = i.shapes[0].bytes, len(set(layout.slices))
    return Collective(
        kind=kind if kind in KINDS else "send",
        link="dcn",
        axes=layout.across,
        group=slices,
        dtype=i.shapes[0].dtype,
        operand=size,
        result=size,
        count=visit.times,
        bytes=visit.times * (received("all-reduce", size, size, slices) if kind == "all-reduce" else size),
        in_loop=visit.in_loop,
        parameter="",
        source=module.source(i),
        phase=phase(i.op_name),
        torus=(),
    )


def phase(op_name: str) -> str:
    """Return forward, backward, recompute or update, from what JAX called the operation; empty without a name."""
    if not op_name:
        return ""
    if "rematted_computation" in op_name:
        return "recompute"
    return "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else "update"
