"""Whose a collective is: the parameter whose value it moves."""

import re

from aether.plan.hlo import Computation, Instruction, Module, Visit

TRACED = {
    *("copy", "copy-start", "copy-done", "convert", "bitcast", "bitcast-convert", "reshape", "transpose", "tuple"),
    *("get-tuple-element", "dynamic-slice", "slice", "pad", "fusion", "while", "optimization-barrier", "all-gather"),
    *("async-start", "async-update", "async-done", "slice-start", "slice-done", "dynamic-slice-start"),
    "dynamic-slice-done",
}


def parameter_of(module: Module, visit: Visit) -> str:
    """Return the parameter whose value (a layer of it, in another dtype) a collective moves, or an empty string."""
    found: set[str] = set()
    seen: set[tuple] = set()

    def follow(i: Instruction, here: Computation, callers: tuple, index: int | None) -> bool:
        """Collect the entry parameters behind a value; False if other work is behind it too."""
        key = (here.name, i.name, index)
        if key in seen or (len(i.shapes) == 1 and not i.shapes[0].dims and i.opcode != "get-tuple-element"):
            return True
        seen.add(key)
        if i.opcode == "parameter" and not callers:
            found.add(i.op_name)
            return len(found) < 2
        if i.opcode == "parameter":
            caller, above = callers[-1]
            number = 0 if caller.opcode == "while" else int(i.inner)
            return follow(above.instructions[caller.operands[number]], above, callers[:-1], index)
        if i.opcode in ("constant", "iota", "partition-id"):
            return True
        if i.opcode not in TRACED:
            return False
        if i.opcode == "get-tuple-element":
            return follow(here.instructions[i.operands[0]], here, callers, int(i.attribute("index")))
        if i.opcode == "tuple" and index is not None:
            return follow(here.instructions[i.operands[index]], here, callers, None)
        if i.opcode == "fusion" and not _moves_only(module, i):
            return False
        return all(follow(here.instructions[n], here, callers, index) for n in i.operands if n in here.instructions)

    i, here = visit.instruction, visit.computation
    pure = all(follow(here.instructions[n], here, visit.callers, None) for n in i.operands if n in here.instructions)
    name = next(iter(found)) if pure and len(found) == 1 else ""
    return "/".join(re.findall(r"\['([^']*)'\]", name)) if name.startswith("state.params") else ""


def _moves_only(module: Module, i: Instruction) -> bool:
    """Return whether a fusion only slices, converts and moves its operands."""
    inner = module.computations[i.calls()[0]]
    index = {"parameter", "constant", "add", "subtract", "compare", "select", "clamp", "iota", "broadcast", "multiply"}
    return all(
        n.opcode in TRACED or n.opcode in index and (n.opcode == "parameter" or not n.shapes[0].dims)
        for n in inner.instructions.values()
        if n.opcode not in ("parameter", "constant")
    )
