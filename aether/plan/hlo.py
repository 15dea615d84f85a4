"""An optimized HLO module: instructions, calls, and how often they run.

The compiler's own counts take a loop body once. Here `walk` multiplies by the trips of the loops around it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

WIDTHS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
FUSED = ("fusion",)  # what these call lies in registers or on-chip memory: no traffic and no cycles of its own
APPLIED = ("all-reduce", "reduce", "reduce-window", "reduce-scatter", "scatter", "select-and-scatter", "sort", "map")

_CALLS = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation|async_execution)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^{}]*)\}")


@dataclass(frozen=True)
class Shape:
    """One array of a result; `on_chip` if the compiler keeps it in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Return its size, without the padding of tiled layouts."""
        return math.ceil(math.prod(self.dims) * bits(self.dtype) / 8)


def own_line(path: str, line: int) -> str:
    """Return `nn/linear.py:60` for a line of this package, and an empty string for any other."""
    return f"{path.rpartition('/aether/')[2]}:{line}" if "/aether/" in path else ""


def bits(dtype: str) -> int:
    """Return the bits of one entry: `bf16`, `s32`, `f8e4m3fn`."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return WIDTHS[dtype] if dtype in WIDTHS else int(digits.group(1)) if digits else 0


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = shapes opcode(operands), attributes`; a tuple's shapes are flattened."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    inner: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Return the size of the result."""
        return sum(s.bytes for s in self.shapes)

    def attribute(self, name: str) -> str:
        """Return the attribute `name=...` up to a comma, or an empty string."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|[^,\s]*)", self.attributes)
        return found.group(1) if found else ""

    @property
    def op_name(self) -> str:
        """Return what JAX called the operation, or the entry parameter."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1).replace("\\'", "'") if found else ""

    def calls(self) -> list[str]:
        """Return the computations it runs; not the condition of a loop nor functions applied to scalars.

        What an `async-start` runs is named again, in some versions, by its `async-update` and `async-done`.
        """
        if self.opcode.removesuffix("-start") in APPLIED or self.opcode in ("async-update", "async-done"):
            return []
        found = _CALLS.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            found += re.findall(r"[\w.\-]+", group)
        return list(dict.fromkeys(found))

    def estimated_cycles(self) -> int:
        """Return the TPU compiler's estimate of one run, 0 where it gave none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 0

    def stated_cost(self) -> tuple[int, int]:
        """Return the FLOPs and the bytes of HBM that a Pallas kernel for TPUs states of one run, or zeros."""
        found = re.search(r'"cost_estimate":\{"flops":"(\d+)",.*?"bytes_accessed":"(\d+)"', self.attributes)
        return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        """Return the instruction whose value is the computation's."""
        return next((i for i in self.instructions.values() if i.root), next(reversed(self.instructions.values())))

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Return the parameters by number."""
        return {int(i.inner): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Return the instructions that read each value."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for i in self.instructions.values():
            for name in dict.fromkeys(i.operands):
                found.setdefault(name, []).append(i)
        return found


@dataclass(frozen=True)
class Visit:
    """An instruction as the program runs it: `times` a step, inside loops or not, inside a fusion or not."""

    instruction: Instruction
    computation: Computation
    times: int
    in_loop: bool
    fused: bool
    callers: tuple[tuple[Instruction, Computation], ...]


@dataclass
class Module:
    """A whole program; `warnings` names what could not be counted as it runs."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, str]
    warnings: list[str] = field(default_factory=list)

    def walk(self) -> Iterator[Visit]:
        """Yield every instruction that runs, with how often; each branch of a conditional counts as run.

        A loop whose trips are only known as it runs, as of attention over causal blocks, counts as (n + 1) / 2 trips
        inside a loop of n, and as one otherwise; `warnings` names it.
        """
        yield from self._walk(self.entry, 1, 1, False, ())

    def _walk(self, name: str, times: int, around: int, fused: bool, callers: tuple) -> Iterator[Visit]:
        here = self.computations[name]
        in_loop = any(caller.opcode == "while" for caller, _ in callers)
        for i in here.instructions.values():
            yield Visit(i, here, times, in_loop, fused, callers)
            loop, runs = around, times
            if i.opcode == "while":
                known = self.trips(i, here)
                loop = known or 1
                runs = times * (around + 1) // 2 if known is None else times * known
                if known is None:
                    self._warn(i, (around + 1) / 2)
            for called in i.calls():
                if called in self.computations:
                    yield from self._walk(called, runs, loop, fused or i.opcode in FUSED, (*callers, (i, here)))

    def _warn(self, loop: Instruction, assumed: float) -> None:
        text = f"{loop.op_name or loop.name} has a number of trips that the program decides; {assumed:g} are counted"
        if text not in self.warnings:
            self.warnings.append(text)

    def trips(self, loop: Instruction, here: Computation) -> int | None:
        """Return how often a `while` runs its body: as the compiler says, or from condition, start and step."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        return int(known.group(1)) if known else self._counted(loop, here)

    def _counted(self, loop: Instruction, here: Computation) -> int | None:
        """Return the trips of `for (i = start; i < limit; i += step)`."""
        condition = self.computations.get(loop.attribute("condition").lstrip("%"))
        body = self.computations.get(loop.attribute("body").lstrip("%"))
        compare = condition and self._comparison(condition, condition.root)
        if not (condition and body and compare):
            return None
        (where, counter, limit, direction) = compare
        index = _index(where, counter)
        end = self._constant(where, limit)
        if index is None and counter.opcode == "parameter" and where is not condition:  # compare inside a fusion
            caller = condition.root
            operand = condition.instructions[caller.operands[int(counter.inner)]]
            index = _index(condition, operand)
        if end is None and limit.opcode == "parameter" and where is not condition:
            end = self._constant(condition, condition.instructions[condition.root.operands[int(limit.inner)]])
        if index is None or end is None or direction not in ("LT", "LE"):
            return None
        state = here.instructions.get(loop.operands[0])
        start = self._constant(here, here.instructions[state.operands[index]]) if state and state.operands else None
        step = self._step(body, index)
        last = end + (direction == "LE")
        return max(math.ceil((last - (start or 0)) / (step or 1)), 0)

    def _comparison(self, here: Computation, i: Instruction) -> tuple | None:
        """Return (computation, counter, limit, direction) of the comparison that `i` is or calls."""
        if i.opcode == "fusion" and i.calls():
            inner = self.computations[i.calls()[0]]
            return self._comparison(inner, inner.root)
        if i.opcode in ("copy", "bitcast", "convert") and i.operands:
            return self._comparison(here, here.instructions[i.operands[0]])
        if i.opcode != "compare":
            return None
        a, b = (here.instructions[name] for name in i.operands)
        return here, a, b, i.attribute("direction")

    def _constant(self, here: Computation, i: Instruction) -> int | None:
        """Return the integer that `i` is, behind copies."""
        while i.opcode in ("copy", "bitcast", "copy-start", "copy-done", "convert") and i.operands:
            i = here.instructions[i.operands[0]]
        return int(i.inner) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inner) else None

    def _step(self, body: Computation, index: int) -> int | None:
        """Return the constant that a body adds to element `index` of its state."""
        i = body.instructions[body.root.operands[index]] if index < len(body.root.operands) else body.root
        while i.opcode in ("copy", "bitcast") and i.operands:
            i = body.instructions[i.operands[0]]
        if i.opcode != "add":
            return None
        found = [self._constant(body, body.instructions[name]) for name in i.operands]
        return next((n for n in found if n), None)

    def source(self, i: Instruction) -> str:
        """Return the innermost line of ours that made an instruction, `nn/linear.py:60`, or an empty string."""
        found = re.search(r"stack_frame_id=(\d+)", i.attributes)
        if found:
            return self.frames.get(int(found.group(1)), "")
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', i.attributes)
        return own_line(file.group(1), int(file.group(2))) if file else ""


def _index(here: Computation, i: Instruction) -> int | None:
    while i.opcode in ("copy", "bitcast") and i.operands:
        i = here.instructions[i.operands[0]]
    return int(i.attribute("index")) if i.opcode == "get-tuple-element" else None
