"""Trace some training steps on this machine and say where their time goes, by operation and by scope.

python -m tools.profile --config=configs/quickstart.py --steps=5
  --config.KEY=VALUE       another size, batch or form, as with launch.train
  --out=DIR --top=20       where the trace goes (TensorBoard and xprof read it), and how many operations are listed

The step is the trainer's own, compiled for all devices with the state donated; its batch is random: ids, one document a
row, or pixels. Times are of operations, without loops and calls, whose insides are counted: where threads or streams
run side by side their sum is more than the time of the step, and where the device waits it is less.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from aether.errors import AetherError
from launch import cli

FLAGS = cli.new_flags(config=True)
flags.DEFINE_integer("steps", 5, "traced steps", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_integer("top", 20, "operations listed", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_string("out", "", "folder of the trace (a new one in the system's for temporary files)", flag_values=FLAGS)
flags.DEFINE_integer("vocab", 0, "ids of the tokenizer, or classes (0: by the config)", 0, flag_values=FLAGS)

WARM_UP = 2  # steps before the trace
STAGES = ("stem", "stage0", "stage1", "stage2", "stage3")  # of ResNets
SCOPES = ("embed", "attention", "mlp", *STAGES, "head", "optimizer", "blocks")  # the last: what the scan adds
INSIDE = ("while", "conditional", "call", "async-start", "async-update", "async-done")  # operations that hold others


@dataclass
class Operation:
    """An instruction of the program: what JAX calls it, how often the trace has it, and how long together, ms."""

    name: str
    op_name: str
    runs: int = 0
    ms: float = 0.0

    @property
    def scope(self) -> str:
        """Return the scope that the operation belongs to, or "other"."""
        words = re.split(r"[^\w]+", self.op_name)
        return next((scope for scope in SCOPES if scope in words), "other")

    @property
    def backward(self) -> bool:
        """Say whether it belongs to the backward pass, recomputation included."""
        return "transpose(jvp" in self.op_name


def main(args: flags.FlagValues) -> None:
    """Trace and print both tables."""
    config = cli.config_of(args)
    folder = args.out or tempfile.mkdtemp(prefix="aether-profile-")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program from there has the names of older code
    from aether import parallel
    from aether.plan.measure import resolved
    from aether.plan.read import parse
    from tools import bench_step

    config = resolved(config, args.vocab)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check(config, mesh)
    program = bench_step.compiled(config, mesh)
    ms = traced(program.start(), args.steps, folder)
    module = parse(program.compiled.as_text())
    names = {i.name: i for c in module.computations.values() for i in c.instructions.values()}
    known = {name: i.op_name for name, i in names.items() if i.opcode not in INSIDE}
    operations = checked(summed(events(folder), known), folder, mesh.devices.flat[0].device_kind)
    print(report(operations, args.steps, args.top, ms))
    print(f"\ntrace: {folder}")


def traced(call: Any, steps: int, folder: str) -> float:
    """Write a trace of some steps after a few others; return how long each took, ms."""
    import jax

    for _ in range(WARM_UP):
        jax.block_until_ready(call())
    with jax.profiler.trace(folder):
        begin = time.perf_counter()
        for _ in range(steps):
            result = call()
        jax.block_until_ready(result)
        seconds = time.perf_counter() - begin
    return 1e3 * seconds / steps


def events(folder: str) -> Iterator[tuple[str, float]]:
    """Yield (instruction, ms) for what the newest trace in a folder says devices ran; CPUs trace on the host's plane.

    An event names its instruction in `hlo_op`, or, on TPUs, begins with its text.
    """
    import jax

    files = sorted(Path(folder).glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes) if files else []
    devices = [p for p in planes if re.match(r"/device:(GPU|TPU):", p.name)]
    for plane in devices or [p for p in planes if p.name.startswith("/host:CPU")]:
        for line in plane.lines:
            for event in line.events if not line.name.startswith("Async") else ():
                text = re.match(r"%([\w.\-]+) = ", event.name)
                name = text.group(1) if text else dict(event.stats).get("hlo_op")
                if name:
                    yield str(name), event.duration_ns / 1e6


def summed(found: Iterable[tuple[str, float]], known: dict[str, str]) -> list[Operation]:
    """Sum events by instruction, the longest first; those that are not `known` (name -> JAX's name) are left out."""
    operations: dict[str, Operation] = {}
    for name, ms in found:
        if name in known:
            operation = operations.setdefault(name, Operation(name, known[name]))
            operation.runs += 1
            operation.ms += ms
    return sorted(operations.values(), key=lambda o: -o.ms)


def checked(operations: list[Operation], folder: str, kind: str) -> list[Operation]:
    """Return the operations; if there are none the trace holds nothing to sum, which is an error."""
    if not operations:
        raise AetherError(
            f"The trace in {folder} holds no operations of the step on {kind}, so that there is nothing to sum; "
            "look at it with xprof or TensorBoard."
        )
    return operations


def report(operations: list[Operation], steps: int, top: int, ms: float) -> str:
    """Return both tables; times are of one step."""
    total = sum(o.ms for o in operations)
    lines = [f"a step: {ms:.2f} ms; its operations together: {total / steps:.2f} ms, of {steps} steps traced", ""]
    lines += ["| scope | forward ms | backward ms | share |", "| --- | ---: | ---: | ---: |"]
    scopes = {scope: [o for o in operations if o.scope == scope] for scope in (*SCOPES, "other")}
    for scope, its in sorted(scopes.items(), key=lambda item: -sum(o.ms for o in item[1])):
        ways = [sum(o.ms for o in its if o.backward is backward) for backward in (False, True)]
        if its:
            lines.append(
                f"| {scope} | {ways[0] / steps:.2f} | {ways[1] / steps:.2f} | {100 * sum(ways) / total:.1f} % |"
            )
    lines += [
        "",
        "| operation | ms | share | runs | scope | what it computes |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for o in operations[:top]:
        scope = f"{o.scope}, backward" if o.backward else o.scope
        share, what = 100 * o.ms / total, "/".join(o.op_name.split("/")[-2:])
        lines.append(f"| {o.name} | {o.ms / steps:.3f} | {share:.1f} % | {o.runs / steps:g} | {scope} | {what} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
