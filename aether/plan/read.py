"""From the text of `compiled.as_text()` to a module."""

import re
from collections.abc import Iterator

from aether.plan.hlo import Computation, Instruction, Module, Shape, own_line

VMEM = "S(1)"  # memory space of the TPU's on-chip memory in a layout; no number means HBM

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


def parse(text: str) -> Module:
    """Read a module from its text.

    Raises:
      ValueError: there is no entry computation.
    """
    text = re.sub(r"/\*.*?\*/", "", text)
    # That of Pallas kernels is JSON on lines of its own.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text, flags=re.DOTALL)
    computations: dict[str, Computation] = {}
    entry, here = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            here = computations[header.group(2)] = Computation(header.group(2))
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and (i := _instruction(line)):
            here.instructions[i.name] = i
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opcode = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : close - 1]
    operands = tuple(_NAME.findall(inner)) if opcode.group(1) not in ("constant", "parameter") else ()
    shapes = tuple(shapes_of(line[at:end]))
    return Instruction(head.group(2), shapes, opcode.group(1), operands, inner, line[close:], bool(head.group(1)))


def shapes_of(text: str) -> Iterator[Shape]:
    """Yield the arrays of a type, those of a tuple one by one."""
    for dtype, dims, layout in _SHAPE.findall(text):
        yield Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), VMEM in layout)


def _closing(line: str, at: int) -> int:
    """Return the position behind the parenthesis that closes the one at `at`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, at):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(line)


def _frames(text: str) -> dict[int, str]:
    """Return for each stack frame of the module's tables the innermost line of ours."""
    tables: dict[str, dict[int, str]] = {}
    name = ""
    for line in text[: text.find("\n%") if "\n%" in text else len(text)].splitlines():
        row = re.match(r"(\d+) (.*)", line)
        if re.fullmatch(r"[A-Z][A-Za-z]+", line):
            name = line
            tables[name] = {}
        elif row and name:
            tables[name][int(row.group(1))] = row.group(2)
    numbers = {name: {k: _numbers(v) for k, v in rows.items()} for name, rows in tables.items()}
    places, frames = numbers.get("FileLocations", {}), numbers.get("StackFrames", {})
    lines = {
        k: own_line(tables["FileNames"].get(at.get("file_name_id", 0), "").strip('"'), at.get("line", 0))
        for k, at in places.items()
    }
    shift = int(any(row.get("parent_frame_id") == k for k, row in frames.items()))  # XLA writes the parent's number + 1
    found: dict[int, str] = {}
    for k, frame in sorted(frames.items()):  # a parent comes before its children
        parent = frame.get("parent_frame_id", 0) - shift
        found[k] = lines.get(frame.get("file_location_id", 0), "") or found.get(parent, "")
    return found


def _numbers(text: str) -> dict[str, int]:
    return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", text)}
