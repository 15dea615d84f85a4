"""FLOPs and memory traffic of a program, counted from its instructions with the trips of its loops."""

import math
from collections import Counter
from dataclasses import dataclass, field

from aether.plan.hlo import Computation, Instruction, Module, Visit

# What moves no bytes itself: names for values, and calls whose bodies are counted.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
}
PLACEHOLDERS = {  # custom calls that compute nothing
    *("AssumeGatherIndicesInBound", "AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast"),
    "ZeroCrop",
    *(
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "MoveToHost",
        "MoveToDevice",
        "annotate_device_placement",
    ),
}


@dataclass
class Counts:
    """What one device does in a step.

    `flops` are those of matrix products and convolutions; `cycles` and `hbm_bytes` are None where nothing is known;
    `uncounted` are custom calls, target -> runs, of which nothing is known; `stated` are kernels that say what they do
    (`pl.CostEstimate`), which is counted, but for their cycles, and stands apart in `kernel_flops` and `kernel_bytes`.
    """

    flops: int = 0
    cycles: int | None = None
    hbm_bytes: int | None = 0
    uncounted: Counter[str] = field(default_factory=Counter)
    stated: Counter[str] = field(default_factory=Counter)
    kernel_flops: int = 0
    kernel_bytes: int = 0


def count(module: Module) -> Counts:
    """Count FLOPs, estimated cycles and bytes between HBM and chip over the whole program."""
    counts, cycles, moved, estimated = Counts(), 0, 0, False
    for visit in module.walk():
        i = visit.instruction
        if i.opcode in ("dot", "convolution"):
            counts.flops += visit.times * flops(i, visit.computation)
        if i.opcode == "custom-call" and i.attribute("custom_call_target").strip('"') not in PLACEHOLDERS:
            cost, target = i.stated_cost(), i.attribute("custom_call_target").strip('"')
            (counts.stated if cost else counts.uncounted)[target] += visit.times
            if cost:
                counts.flops += visit.times * cost[0]
                counts.kernel_flops += visit.times * cost[0]
                counts.kernel_bytes += visit.times * cost[1]
        if not visit.fused:
            moved += visit.times * traffic(visit, module)
            estimate = i.estimated_cycles()
            cycles, estimated = cycles + visit.times * estimate, estimated or estimate > 0
    counts.cycles, counts.hbm_bytes = cycles if estimated else None, moved
    return counts


def flops(i: Instruction, here: Computation) -> int:
    """Return 2 · multiplications of a `dot` or a `convolution`.

    A convolution multiplies only where a position of the kernel meets one of the input: neither padding nor the
    zeros of a dilated input count. (The TPU compiler writes matrix products as such convolutions.)
    """
    left, right = (here.instructions[name].shapes[0].dims for name in i.operands[:2])
    if i.opcode == "dot":
        contracted = [int(d) for d in i.attribute("lhs_contracting_dims").strip("{}").split(",") if d]
        return 2 * math.prod(i.shapes[0].dims) * math.prod(left[d] for d in contracted)
    inputs, kernel, output = _labels(i.attribute("dim_labels"))
    window = _window(i.attribute("window"), len(kernel) - 2)
    pairs = math.prod(
        _valid(left[inputs[str(k)]], right[kernel[str(k)]], i.shapes[0].dims[output[str(k)]], *sizes)
        for k, sizes in enumerate(window)
    )
    groups = int(i.attribute("batch_group_count") or 1)
    batch, features = i.shapes[0].dims[output["b"]], i.shapes[0].dims[output["f"]]
    return (
        2 * batch * features * right[kernel["i"]] * pairs // 1
        if groups == 1
        else 2 * (left[inputs["b"]] // groups * features * right[kernel["i"]] * pairs)
    )


def _labels(text: str) -> list[dict[str, int]]:
    """Turn `0bf_0io->0bf` into dimension numbers by label, for input, kernel and output."""
    left, _, output = text.partition("->")
    return [{label: k for k, label in enumerate(part)} for part in (*left.split("_"), output)]


def _window(text: str, rank: int) -> list[tuple[int, int, int, int]]:
    """Return (stride, low padding, input dilation, kernel dilation) for each spatial dimension."""
    fields = dict(part.split("=") for part in text.strip("{}").split() if "=" in part)

    def of(name: str) -> list[str]:
        return fields[name].split("x") if name in fields else []

    def at(name: str, k: int, default: int) -> int:
        values = of(name)
        return int(values[k].split("_")[0]) if values else default

    return [(at("stride", k, 1), at("pad", k, 0), at("lhs_dilate", k, 1), at("rhs_dilate", k, 1)) for k in range(rank)]


def _valid(size: int, kernel: int, output: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """Count the pairs of an output and a kernel position that meet an entry of the input."""
    if kernel == 1 and low == 0 and spread == 1:
        return output
    width = (size - 1) * spread + 1
    found = 0
    for k in range(kernel):
        first = k * dilation - low  # place in the dilated, unpadded input that output 0 reads
        step, target = stride % spread, -first % spread
        period = spread // math.gcd(step, spread) if step else 1
        hits = [o for o in range(min(period, output)) if (o * step - target) % spread == 0]
        lowest = max(math.ceil(-first / stride), 0)
        highest = min((width - 1 - first) // stride, output - 1)
        found += sum(max((highest - o) // period - math.ceil((lowest - o) / period) + 1, 0) for o in hits)
    return found


def traffic(visit: Visit, module: Module) -> int:
    """Return the bytes that an instruction outside fusions reads from HBM and writes to it.

    Operands that are only sliced count as their slices, and what is updated in place as the update; arrays that the
    compiler keeps on the chip (TPU) count as nothing. Every other operand counts as read once, whole.
    """
    i, here = visit.instruction, visit.computation
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0
    if cost := i.stated_cost():
        return cost[1]
    if i.opcode.endswith("-start"):  # (operands..., results..., semaphores)
        return sum(s.bytes for s in i.shapes if not s.on_chip)
    read = sum(_read(module, here, i, k) for k in range(len(i.operands)))
    return read + _written(module, here, i)


def _read(module: Module, here: Computation, i: Instruction, k: int) -> int:
    shapes = here.instructions[i.operands[k]].shapes if i.operands[k] in here.instructions else ()
    whole = sum(s.bytes for s in shapes if not s.on_chip)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return min(i.bytes, whole) if k == 0 else whole
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 0 if k == 0 else whole
    inner = module.computations[i.calls()[0]] if i.opcode == "fusion" else None
    if inner is None or not whole or k not in inner.parameters:
        return whole
    uses = inner.users[inner.parameters[k].name]
    parts = [
        _read(module, inner, u, n)
        for u in uses
        for n, name in enumerate(u.operands)
        if name == inner.parameters[k].name
    ]
    sliced = uses and all(
        u.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice", "fusion") for u in uses
    )
    return min(sum(parts), whole) if sliced else whole


def _written(module: Module, here: Computation, i: Instruction) -> int:
    whole = sum(s.bytes for s in i.shapes if not s.on_chip)
    if i.opcode == "dynamic-update-slice":
        return min(here.instructions[i.operands[1]].bytes, whole)
    if i.opcode != "fusion":
        return whole
    inner = module.computations[i.calls()[0]]
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    total = 0
    for root, shape in zip(roots, i.shapes, strict=False):
        if shape.on_chip:
            continue
        while root.opcode == "bitcast":
            root = inner.instructions[root.operands[0]]
        total += _written(module, inner, root) if root.opcode in ("dynamic-update-slice", "fusion") else shape.bytes
    return total
